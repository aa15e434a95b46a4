"""The generic adapter: prune what a parent module hands to its text decoder, and what its layers hand to each other.

Hooks sit on the *root* (the module that takes token ids and calls the decoder: it opens the state of a forward), on
the *decoder* (its per-token arguments are shortened before its forward runs, and its output gets the unpruned length
back after it) and, where a method prunes inside the decoder, on its layers (:mod:`layers`). What must outlive the
forward sits on the KV cache (:mod:`cache`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from tokenprune.errors import InputError, OptionError
from tokenprune.models import eviction, layers
from tokenprune.models.base import Engine, Hook, Swap
from tokenprune.models.cache import ledger_of
from tokenprune.models.ends import call_of, check_call, lengthened, mask_of, positions_of, shape_of, write_merged
from tokenprune.models.forward import CURRENT, Forward, current, first_segments
from tokenprune.models.planning import plan_inside
from tokenprune.models.selection import (
    SITE,
    Merged,
    keep_rows,
    reduce_images,
    sizes_of,
    skipped,
    tokens_by_row,
)
from tokenprune.models.visual import find_images, refuse_unknown_features
from tokenprune.upstream.caches import (
    LAYERED,
    cache_in,
    check_cache,
    check_classes,
    forget,
    layers_of,
    no_cache,
    past_length,
    record,
    window_of,
)
from tokenprune.upstream.calls import check_decoder, check_root
from tokenprune.upstream.decoder_call import DecoderCall
from tokenprune.upstream.facts import DecoderFacts
from tokenprune.upstream.families import Family, n_planes, placeholder_id
from tokenprune.upstream.masks import check_builder
from tokenprune.upstream.prompts import Prompt
from tokenprune.upstream.quantized_cache import use_planes


class DecoderAdapter:
    """Sites of a multimodal model whose text decoder stands apart.

    Args:
        root: the module that takes token ids and calls the decoder.
        decoder: the text decoder.
        family: its row in the table of families.

    Raises:
        UnsupportedModelError: something that pruning works with is not there under any name known.
    """

    def __init__(self, root: nn.Module, decoder: nn.Module, family: Family) -> None:
        self.root = root
        self.decoder = decoder
        self.row = family
        self.facts = DecoderFacts(decoder)
        self._unpacks = self.facts.flash
        check_root(root)
        check_decoder(decoder, planes=n_planes(root) > 0)
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
                "text"
            )
        if unknown := [site for site in sites if site not in (SITE, layers.SITE)]:
            raise OptionError(
                f"{self.family} models have the sites {SITE!r} and {layers.SITE!r} only, and {unknown} were asked for"
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
        inside = plan_inside(engine, self.root, self.decoder, self.facts, has_images=bool(self.row.ids))

        def open_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            CURRENT.set(inside.open(engine, Prompt.read(module, args, kwargs), CURRENT.get()))

        def close_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            state = current(engine)
            if state is not None:
                CURRENT.set(state.outer)
                if output is not None and state.traces:
                    (engine.publish_later if state.continues else engine.publish)(tuple(state.traces))

        return [
            Hook(self.root, "pre", open_forward),
            Hook(self.root, "post", close_forward),
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
        if given.embeds is None and given.ids is not None and state is not None and not self.row.ids:
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
        self._enter(engine, state, given)
        state.prompt = Prompt()  # no hook runs after a KeyboardInterrupt; this state may stay, the inputs should not
        if state.call is None:
            return False
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
            self._note_time(state, started)
        if with_ids:
            given.embeds = None
        return True

    @staticmethod
    def _note_time(state: Forward, started: float) -> None:
        """Write all the time that was spent before the decoder into the last trace of this site."""
        before = [trace for trace in state.traces if trace.site == SITE]
        if before:
            spent = (time.perf_counter() - started) * 1e3 - sum(trace.overhead_ms for trace in before[:-1])
            place = max(i for i, trace in enumerate(state.traces) if trace is before[-1])
            state.traces[place] = replace(before[-1], overhead_ms=spent)

    def _enter(self, engine: Engine, state: Forward, given: DecoderCall) -> None:
        """Run the methods of this site on the images of the forward, and put merged tokens in place.

        Sets the state's call (unless nothing will be changed), its first segments and what it knows of visual tokens.
        Appends traces.

        Raises:
            UnsupportedModelError: image features came in by an argument that is not known.
        """
        embeds, cache = given.embeds, given.cache
        assert embeds is not None
        reducers, later = engine.reducers(SITE), engine.layer_reducers()
        past, (n_rows, length) = past_length(cache), embeds.shape[:2]
        active = engine.active and n_rows * length > 0
        prompt = length > 1 or not past
        images = []
        if active and (reducers or later):
            if state.prompt.has_features:
                images = find_images(self.root, self.row, state.prompt, given.positions)
            elif prompt:
                refuse_unknown_features(self.root, self.row, state.prompt, embeds)
        state.continues = past > 0 and not images
        state.scoring = active and state.plan is not None
        state.steering = active and state.attention is not None
        texts = active and state.guard is not None
        if state.steering and cache is not None and not past and state.quantizes:
            use_planes(cache)
        if not images and engine.active and prompt:  # a decoding step is no news
            reason = "no image in this call" if n_rows * length else "empty input"
            state.traces += skipped((reducer.name for reducer in reducers), reason)
            if not texts:
                state.traces += skipped((reducer.name for reducer in later), reason, site=layers.SITE)
        if not images and not texts:
            if ledger_of(cache) is not None or state.steering:
                state.call = call_of(given, self.facts, past)
            return
        check_cache(cache, layered=bool(later))
        self.facts.check_windows([window_of(layer) for layer in layers_of(cache)])
        left, merged = images, list[Merged]()
        for reducer in reducers if images else ():
            left, embeds, trace = reduce_images(left, reducer, embeds, merged)
            state.traces.append(trace)
        kept_all = not images or not reducers or state.traces[0].n_in == state.traces[-1].n_out
        through = not kept_all or bool(images and engine.forced and reducers)
        if not through and not later and ledger_of(cache) is None:
            return
        given.embeds = embeds
        state.call = call = call_of(given, self.facts, past)
        if later and prompt:
            state.visual = tokens_by_row(left, n_rows)
        if through:
            shape = n_rows, length
            keep, dropped = keep_rows(
                images, left, call.padding, shape=shape, device=embeds.device, left=call.recurrent
            )
            sizes = sizes_of(merged, shape, embeds.device)
            for segment in state.segments:
                segment.keep = keep
                segment.bias = None if sizes is None else keep.apply(sizes).log()
            if engine.positions == "packed":
                state.lowered = dropped.cumsum(dim=1)
        if texts:
            eviction.begin(state, call, ledger_of(cache), prompt=prompt)
        state.entered = tuple(map(len, state.visual))
        if merged:
            given.change_planes(partial(write_merged, merged))

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
        if ledger is not None and state.steering:
            ledger.head_scores, ledger.patterns = state.head_scores, state.patterns
            ledger.traffic += state.traffic
        if state.steering:
            state.owner.publish_traffic(state.traffic if ledger is None else ledger.traffic)
        if ledger is not None and state.scoring:
            eviction.end(state, call, cache, ledger)
        return None if kept_all else lengthened(output, state, call)
