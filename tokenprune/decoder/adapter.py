"""The generic adapter: prune what a parent module hands to its text decoder, and what its layers hand to each other.

What happens to a prompt, in turn:

1. The *root* (the module that takes token ids and calls the decoder) is called; its hook opens the state of a forward.
2. The *decoder* is called; what it is given is read (:mod:`tokenprune.upstream.decoder_call`) and checked.
3. Images are found among its tokens, the methods choose, and what they keep becomes one reduction
   (:mod:`tokenprune.decoder.entrance`).
4. That reduction shortens everything that the decoder is given for each token.
5. Where a method prunes inside the decoder, the layers hand fewer tokens to each other
   (:mod:`tokenprune.decoder.between_layers`).
6. What the KV cache holds is written down on it (:mod:`tokenprune.decoder.pruned_cache`).
7. The output gets its unpruned length back (:mod:`tokenprune.decoder.output`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tokenprune import running
from tokenprune.decode import eviction
from tokenprune.decoder import around, between_layers, output
from tokenprune.decoder.call import check_call, shape_of
from tokenprune.decoder.entrance import Host, enter, note_time, positions_of
from tokenprune.decoder.masks import decoder_mask
from tokenprune.decoder.plan import DecoderPlan, plan_inside
from tokenprune.decoder.pruned_cache import ledger_of
from tokenprune.decoder.segments import first_segments
from tokenprune.decoder.select import SITE
from tokenprune.decoder.state import Forward
from tokenprune.errors import InputError, OptionError
from tokenprune.hooks import Hook, Swap
from tokenprune.running import current
from tokenprune.session import Session
from tokenprune.upstream.caches import LAYERED, cache_in, check_classes, forget, no_cache, record
from tokenprune.upstream.calls import callers_of, check_forward, embedders_of, tells_logits
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
        check_forward(root, "ids", "embeds")
        planes = ("plane_tokens", "planes") if n_planes(root) else ()
        check_forward(decoder, "embeds", "mask", "positions", "cache", *planes)
        self.facts = DecoderFacts(decoder)
        self._unpacks = self.facts.flash
        self._inside, self._early = DecoderPlan(), False  # whether the hooks of early layers are in place
        self._records = False  # whether the hooks for hidden states are in place
        check_classes()
        check_builder()
        for field in family.ids:
            placeholder_id(root, field)

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.row.name

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

    def hooks(self, session: Session) -> list[Hook | Swap]:
        """What makes `session` act on the model; touches nothing.

        Raises:
            OptionError: the decoder cannot be pruned where the methods want it.
        """
        self._records = self._early = False
        inside = self._inside = plan_inside(session, self.root, self.decoder, self.facts, has_images=bool(self.row.ids))
        if session.methods_at("llm_layer") and not self.callers and not tells_logits(self.root):
            session.remark(
                f"{type(self.root).__name__} does not receive the number of wanted logits: with drafts of an assistant "
                "or of a prompt lookup, the last draft ranks the tokens of a prompt, and not its last token."
            )

        def open_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            prompt = around.with_ids(session, Prompt.read(module, args, kwargs))
            running.enter(inside.open(session, running.innermost(), prompt))

        def close_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            state = current(Forward, session)
            if state is not None:
                running.leave(state)
                if result is not None and state.traces:
                    (session.publish_later if state.continues else session.publish)(tuple(state.traces))

        return [
            Hook(self.root, "pre", open_forward),
            Hook(self.root, "post", close_forward),
            *around.hooks_of(session, self.embedders, self.callers if session.methods_at("llm_layer") else []),
            *self._decoder_hooks(session),
            *inside.hooks,
        ]

    def _decoder_hooks(self, session: Session) -> list[Hook]:
        def shorten(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = DecoderCall.read(module, args, kwargs)
            return ((), given.arguments()) if self._shorten(session, current(Forward, session), given) else None

        def lengthen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
            return self._lengthen(current(Forward, session), DecoderCall.read(module, args, kwargs), result)

        return [Hook(self.decoder, "pre", shorten), Hook(self.decoder, "post", lengthen)]

    @contextmanager
    def probing(self, session: Session, prompt: Prompt) -> Iterator[None]:
        """Within the block calls of the decoder alone are pruned by `session`, as if the root had been called with
        `prompt`."""
        state = Forward(session, running.innermost(), prompt)
        session.install(self._decoder_hooks(session))
        running.enter(state)
        try:
            yield
        finally:
            running.leave(state)
            session.remove()

    def _shorten(self, session: Session, state: Forward | None, given: DecoderCall) -> bool:
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
            raise InputError("a pruned cache is continued through the model, not by calling its decoder with ids")
        layered = bool(session.methods_at("llm_layer"))
        if ledger is not None and ledger.layered and (state is None or not layered):
            raise InputError(LAYERED)
        if ledger is not None and ledger.layered and not self._early and ledger.starts[1] <= len(self._inside.early):
            session.add(list(self._inside.early))
            self._early = True
        check_call(given, self.facts, ledger, unpacks=self._unpacks)
        started = time.perf_counter()
        state = Forward(session, None, Prompt()) if state is None else state
        state.call, state.segments, state.visual, state.scores = None, first_segments(given.cache), (), {}
        state.recall(ledger)
        enter(session, state, given, Host(self.root, self.row, self.facts))
        state.prompt = Prompt()  # no hook runs after a KeyboardInterrupt; this state may stay, the inputs should not
        if state.call is None:
            return False
        self._record(session, state, given)
        if ledger is not None:
            ledger.inside = True
        first, call = state.segments[0], state.call
        whole = first.keep is None and first.slots is None and first.bias is None
        if whole and (ledger is None or call.flat):  # any other mask was made for the unpruned sequence
            return False
        assert given.embeds is not None
        given.mask = decoder_mask(call, first.layout(call), like=given.embeds)
        given.positions = positions_of(given, state, ledger and ledger.shift)
        if first.keep is not None:
            given.shorten(first.keep)
            note_time(state, started)
        if with_ids:
            given.embeds = None
        return True

    def _record(self, session: Session, state: Forward, given: DecoderCall) -> None:
        """Have gradients reach the hidden states of layers, if the caller is to get these."""
        state.whole = [] if given.records and output.wants_graph(self.decoder) else None
        if state.whole is not None and not self._records:
            session.add(output.hooks_of(session, self.decoder))
            self._records = True

    def _lengthen(self, state: Forward | None, given: DecoderCall, result: Any) -> Any:
        """Write the pruning down on the cache, and give the decoder's output its unpruned length back.

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
        if result is None:
            return None
        kept_all = all(segment.keep is None for segment in state.segments)
        if ledger is not None and ledger.length is not None:
            ledger.length = call.past + call.length
        if cache is None and (state.steering or not kept_all):
            cache = cache_in(result)
            if cache is None and self.facts.caches(given.caches):
                raise no_cache(self.facts.called, result)
        if cache is not None and (not kept_all or (ledger is None and (state.scoring or state.steering))):
            ledger = state.ledger(call)
            record(cache, ledger)
        if state.steering:
            state.reads = state.reads.close()
            state.owner.publish_traffic(state.reads.traffic)
        if ledger is not None:
            ledger.check(cache)
            if state.steering:
                ledger.head_scores, ledger.patterns, ledger.reads = state.head_scores, state.patterns, state.reads
            if state.scoring:
                eviction.end(state, call, cache, ledger)
        return None if kept_all else output.lengthened(result, state, call)
