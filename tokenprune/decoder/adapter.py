"""The generic adapter: prune what a parent module hands to its text decoder, and what its layers hand to each other.

Hooks sit on the *root* (the module that takes token ids and calls the decoder: it opens the state of a forward), on
the *decoder* (its per-token arguments are shortened before its forward runs, and its output gets the unpruned length
back after it) and, where a method prunes inside the decoder, on its layers (:mod:`tokenprune.decoder.between_layers`).
What must outlive the forward sits on the KV cache (:mod:`tokenprune.decoder.pruned_cache`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tokenprune.decode import eviction
from tokenprune.decoder import between_layers, prompt_end, recorded_states, visual_mask
from tokenprune.decoder.call import check_call, lengthened, mask_of, positions_of, shape_of
from tokenprune.decoder.entrance import Host, enter, note_time
from tokenprune.decoder.plan import plan_inside
from tokenprune.decoder.pruned_cache import ledger_of
from tokenprune.decoder.select import SITE
from tokenprune.decoder.state import CURRENT, Forward, current, first_segments
from tokenprune.engine import Engine, Hook, Swap
from tokenprune.errors import InputError, OptionError
from tokenprune.upstream.caches import LAYERED, cache_in, check_classes, forget, no_cache, record
from tokenprune.upstream.calls import callers_of, check_decoder, check_root, embedders_of, tells_logits
from tokenprune.upstream.decoder_call import DecoderCall
from tokenprune.upstream.facts import DecoderFacts
from tokenprune.upstream.families import UNNAMED, Family, n_planes, placeholder_id
from tokenprune.upstream.masks import check_builder
from tokenprune.upstream.prompts import Prompt


class DecoderAdapter:
    """Sites of a multimodal model whose text decoder stands apart.

    Args:
        root: the module that takes token ids and calls the decoder.
        decoder: the text decoder.
        family: its row in the table of families.
        model: what holds the root, or the root itself.

    Raises:
        UnsupportedModelError: something that pruning works with is not there under any name known.
    """

    def __init__(self, root: nn.Module, decoder: nn.Module, family: Family, model: nn.Module) -> None:
        self.root = root
        self.callers = callers_of(root, model)
        self.embedders = embedders_of(root, model)
        self.decoder = decoder
        self.row = family
        check_root(root)
        check_decoder(decoder, planes=n_planes(root) > 0)
        self.facts = DecoderFacts(decoder)
        self._unpacks = self.facts.flash
        self._records = False  # whether the hooks for hidden states are in place
        check_classes()
        check_builder()
        for field in family.ids:
            placeholder_id(root, field)

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.row.name

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Modules that get hooks."""
        return (self.root, self.decoder)

    def preflight(self, *, sites: tuple[str, ...], positions: str) -> None:
        """Check that this family has `sites` and that its positions can follow the policy.

        Raises:
            OptionError: it has not, or they cannot.
        """
        if SITE in sites and not self.row.ids:
            raise OptionError(
                f"{self.family} has no visual tokens to prune before the decoder; SpAtten(protect_text=False) prunes "
                f"text; {UNNAMED}"
            )
        if unknown := [site for site in sites if site not in (SITE, between_layers.SITE)]:
            raise OptionError(
                f"{self.family} models have the sites {SITE!r} and {between_layers.SITE!r} only, and {unknown} were "
                "asked for"
            )
        mrope = self.row.mrope or self.facts.mrope
        if positions == "packed" and mrope:
            raise OptionError(
                f'positions="packed" was asked for, but {self.family} gives every visual token a time, a row and a '
                'column (M-RoPE), which cannot be renumbered one by one; use positions="original"'
            )

    def hooks(self, engine: Engine) -> list[Hook | Swap]:
        """What makes `engine` act on the model; touches nothing.

        Raises:
            OptionError: the decoder cannot be pruned where the methods want it.
        """
        self._records = False
        inside = plan_inside(engine, self.root, self.decoder, self.facts, has_images=bool(self.row.ids))
        if engine.layer_reducers() and not self.callers and not tells_logits(self.root):
            engine.remark(
                f"{type(self.root).__name__} is not told how many logits are wanted: with drafts of an assistant or "
                "of a prompt lookup, the last draft ranks the tokens of a prompt, and not its last token."
            )

        def open_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            prompt = visual_mask.with_ids(engine, Prompt.read(module, args, kwargs))
            CURRENT.set(inside.open(engine, prompt, CURRENT.get()))

        def close_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            state = current(engine)
            if state is not None:
                CURRENT.set(state.outer)
                if output is not None and state.traces:
                    (engine.publish_later if state.continues else engine.publish)(tuple(state.traces))

        return [
            Hook(self.root, "pre", open_forward),
            Hook(self.root, "post", close_forward),
            *(hook for caller in self.callers if engine.layer_reducers() for hook in prompt_end.hooks_of(caller)),
            *visual_mask.hooks_of(engine, self.embedders),
            *self._decoder_hooks(engine),
            *inside.hooks,
        ]

    def _decoder_hooks(self, engine: Engine) -> list[Hook]:
        def shorten(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = DecoderCall.read(module, args, kwargs)
            return ((), given.arguments()) if self._shorten(engine, current(engine), given) else None

        def lengthen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._lengthen(current(engine), DecoderCall.read(module, args, kwargs), output)

        return [Hook(self.decoder, "pre", shorten), Hook(self.decoder, "post", lengthen)]

    @contextmanager
    def probing(self, engine: Engine, prompt: Prompt) -> Iterator[None]:
        """Within the block calls of the decoder alone are pruned by `engine`, as if the root had been called with
        `prompt`."""
        shorten, lengthen = (hook.function for hook in self._decoder_hooks(engine))
        token = CURRENT.set(Forward(engine, prompt, None))
        handles = [
            self.decoder.register_forward_pre_hook(shorten, with_kwargs=True),
            self.decoder.register_forward_hook(lengthen, with_kwargs=True, always_call=True),
        ]
        try:
            yield
        finally:
            CURRENT.reset(token)
            for handle in handles:
                handle.remove()

    def _shorten(self, engine: Engine, state: Forward | None, given: DecoderCall) -> bool:
        """Change what the decoder is given; False where it may stay as it is."""
        ledger = ledger_of(given.cache)
        if ledger is not None and ledger.is_stale(given.cache):
            forget(given.cache)
            ledger = None
        with_ids = given.embeds is None and given.ids is not None
        if given.embeds is None and given.ids is not None and state is not None:
            given.embeds = shape_of(given.ids, like=self.decoder)  # a model of text hands ids to its decoder
        if given.embeds is None:
            if ledger is None:
                return False
            raise InputError("a pruned cache goes on through the model itself, not through ids given to its decoder")
        layered = bool(engine.layer_reducers())
        if ledger is not None and ledger.layered and (state is None or not layered):
            raise InputError(LAYERED)
        check_call(given, self.facts, ledger, unpacks=self._unpacks)
        started = time.perf_counter()
        state = Forward(engine, Prompt(), None) if state is None else state
        state.call, state.segments, state.visual, state.scores = None, first_segments(given.cache), (), {}
        state.recall(ledger)
        enter(engine, state, given, Host(self.root, self.row, self.facts))
        state.prompt = Prompt()  # no hook runs after a KeyboardInterrupt; this state may stay, the inputs should not
        if state.call is None:
            return False
        self._record(engine, state, given)
        if ledger is not None:
            ledger.inside = True
        first, call = state.segments[0], state.call
        whole = first.keep is None and first.slots is None and first.bias is None
        if whole and (ledger is None or call.flat):  # any other mask was made for the unpruned sequence
            return False
        assert given.embeds is not None
        given.mask = mask_of(call, first, like=given.embeds)
        given.positions = positions_of(given, state, ledger and ledger.shift)
        if first.keep is not None:
            given.shorten(first.keep)
            note_time(state, started)
        if with_ids:
            given.embeds = None
        return True

    def _record(self, engine: Engine, state: Forward, given: DecoderCall) -> None:
        """Have gradients reach the hidden states of layers, if the caller is to get these."""
        state.whole = [] if given.records and recorded_states.wanted(self.decoder) else None
        if state.whole is not None and not self._records:
            engine.add(recorded_states.hooks_of(engine, self.decoder))
            self._records = True

    def _lengthen(self, state: Forward | None, given: DecoderCall, output: Any) -> Any:
        """Give the decoder's output its unpruned length back and write the pruning down on the cache.

        Raises:
            InputError: the cache does not hold what it should.
            UnsupportedModelError: no cache was seen, although one was to be kept.
        """
        cache = given.cache
        if (ledger := ledger_of(cache)) is not None:
            ledger.inside = False
        if state is None or state.call is None:
            return None
        call, state.call = state.call, None
        if output is None:
            return None
        kept_all = all(segment.keep is None for segment in state.segments)
        if ledger is not None and ledger.length is not None:
            ledger.length = call.past + call.length
        if cache is None and (state.steering or not kept_all):
            cache = cache_in(output)
            if cache is None and self.facts.caches(given.caches):
                raise no_cache(self.facts.called, output)
        if cache is not None and (not kept_all or (ledger is None and (state.scoring or state.steering))):
            ledger = state.ledger(call)
            record(cache, ledger)
        if ledger is not None:
            ledger.check(cache)
        if state.steering:
            state.reads = state.reads.close()
            state.owner.publish_traffic(state.reads.traffic)
        if ledger is not None and state.steering:
            ledger.head_scores, ledger.patterns, ledger.reads = state.head_scores, state.patterns, state.reads
        if ledger is not None and state.scoring:
            eviction.end(state, call, cache, ledger)
        return None if kept_all else lengthened(output, state, call)
