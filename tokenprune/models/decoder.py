"""The generic adapter: prune what a parent module hands to its text decoder, and what its layers hand to each other.

Hooks sit on the *root* (the module that takes `input_ids` and calls the decoder: it opens the state of a forward), on
the *decoder* (its per-token arguments are shortened before its forward runs, and its output gets the unpruned length
back after it) and, where a method prunes inside the decoder, on its layers (:mod:`layers`). What must outlive the
forward sits on the KV cache (:mod:`cache`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tokenprune.errors import InputError, OptionError
from tokenprune.models import eviction, layers, masks
from tokenprune.models.arguments import all_positions, merge_planes, shorten_tensors, stand_in
from tokenprune.models.base import Engine, Hook, Swap
from tokenprune.models.cache import LAYERED, check_cache, ledger_of, past_length, record
from tokenprune.models.families import Family
from tokenprune.models.forward import CURRENT, Call, Forward, Segment, bind, current, first_segments
from tokenprune.models.planning import plan_inside
from tokenprune.models.quantized_cache import use_planes
from tokenprune.models.selection import (
    SITE,
    Merged,
    keep_rows,
    reduce_images,
    sizes_of,
    skipped,
    tokens_by_row,
)
from tokenprune.models.visual import find_images, has_features
from tokenprune.reduction import gather


class DecoderAdapter:
    """Sites of a multimodal model whose text decoder stands apart (`model.get_decoder()`).

    Args:
        root: the module that takes `input_ids` and calls the decoder.
        decoder: the text decoder.
        family: its row in the table of families.
    """

    def __init__(self, root: nn.Module, decoder: nn.Module, family: Family) -> None:
        self.root = root
        self.decoder = decoder
        self.row = family

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
        rope = getattr(self.decoder.config, "rope_parameters", None) or {}
        mrope = self.row.mrope or "mrope_section" in rope
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
        inside = plan_inside(engine, self.root, self.decoder, has_images=bool(self.row.ids))

        def open_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = bind(module.forward, args, kwargs)
            CURRENT.set(inside.open(engine, inputs, CURRENT.get()))

        def close_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            state = current(engine)
            if state is not None:
                CURRENT.set(state.outer)
                if output is not None and state.traces:
                    engine.publish(tuple(state.traces))

        return [
            Hook(self.root, "pre", open_forward),
            Hook(self.root, "post", close_forward),
            *self._decoder_hooks(engine),
            *inside.hooks,
        ]

    def _decoder_hooks(self, engine: Engine) -> list[Hook]:
        def shorten(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = self._shorten(engine, current(engine), bind(module.forward, args, kwargs))
            return None if changed is None else ((), changed)

        def lengthen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._lengthen(current(engine), bind(module.forward, args, kwargs), output)

        return [Hook(self.decoder, "pre", shorten), Hook(self.decoder, "post", lengthen)]

    @contextmanager
    def probing(self, engine: Engine, inputs: dict[str, Any]) -> Iterator[None]:
        """Within the block calls of the decoder alone are pruned by `engine`, as if the root had been called with
        `inputs`."""
        shorten, lengthen = (hook.function for hook in self._decoder_hooks(engine))
        token = CURRENT.set(Forward(engine, inputs, None))
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

    def _shorten(self, engine: Engine, state: Forward | None, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Changed keyword arguments for the decoder, None where they may stay as they are."""
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        ledger = ledger_of(cache)
        if not isinstance(embeds, Tensor) and state is not None and not self.row.ids:
            embeds = stand_in(kwargs["input_ids"], like=self.decoder)  # a model of text hands ids to its decoder
        if not isinstance(embeds, Tensor):
            if ledger is None:
                return None
            raise InputError(
                "a pruned cache goes on through the model itself, not through input_ids given to its decoder"
            )
        layered = bool(engine.layer_reducers())
        if ledger is not None and len(ledger.parts) > 1 and (state is None or not layered):
            raise InputError(LAYERED)
        started = time.perf_counter()
        state = Forward(engine, {}, None) if state is None else state
        state.call, state.segments, state.visual, state.scores = None, first_segments(cache), (), {}
        state.recall(ledger)
        changed = self._enter(engine, state, {**kwargs, "inputs_embeds": embeds})
        state.inputs = {}  # no hook runs after a KeyboardInterrupt; this state may stay, the inputs should not
        if state.call is None:
            return None
        if ledger is not None:
            ledger.inside = True
        first, call = state.segments[0], state.call
        whole = first.keep is None and first.slots is None and first.bias is None
        if whole and (ledger is None or call.flat):  # any other mask was made for the unpruned sequence
            return None
        given = {**kwargs, "inputs_embeds": embeds}
        if kwargs.get("inputs_embeds") is None:
            changed["inputs_embeds"] = None
        changed["attention_mask"] = self._mask(given, call, first)
        changed["position_ids"] = self._positions(given, state, ledger and ledger.shift)
        if first.keep is not None:
            shorten_tensors(changed, first.keep)
            before = [trace for trace in state.traces if trace.site == SITE]
            if before:
                spent = (time.perf_counter() - started) * 1e3 - sum(trace.overhead_ms for trace in before[:-1])
                place = max(i for i, trace in enumerate(state.traces) if trace is before[-1])
                state.traces[place] = replace(before[-1], overhead_ms=spent)
        return changed

    def _enter(self, engine: Engine, state: Forward, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Run the methods of this site on the images of the forward; arguments with merged tokens in place.

        Sets the state's call (unless nothing will be changed), its first segments and what it knows of visual tokens.
        Appends traces.
        """
        embeds, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        reducers, later = engine.reducers(SITE), engine.layer_reducers()
        past, (n_rows, length) = past_length(cache), embeds.shape[:2]
        active = engine.active and n_rows * length > 0
        prompt = length > 1 or not past
        images = []
        if active and (reducers or later) and has_features(state.inputs):
            images = find_images(self.root, self.row, state.inputs, kwargs.get("position_ids"))
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
                state.call = self._call(kwargs)
            return kwargs
        check_cache(cache, layered=bool(later))
        left, merged = images, list[Merged]()
        for reducer in reducers if images else ():
            left, embeds, trace = reduce_images(left, reducer, embeds, merged)
            state.traces.append(trace)
        kept_all = not images or not reducers or state.traces[0].n_in == state.traces[-1].n_out
        through = not kept_all or bool(images and engine.forced and reducers)
        if not through and not later and ledger_of(cache) is None:
            return kwargs
        state.call = call = self._call(kwargs)
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
            kwargs = merge_planes({**kwargs, "inputs_embeds": embeds}, merged)
        return kwargs

    def _call(self, kwargs: dict[str, Any]) -> Call:
        embeds, past = kwargs["inputs_embeds"], past_length(kwargs.get("past_key_values"))
        positions = all_positions(kwargs.get("position_ids"), past, embeds)
        empty = embeds.new_empty(*embeds.shape[:2], 0)
        text = positions[0] if positions.ndim == 3 else positions
        return Call(kwargs.get("attention_mask"), kwargs.get("past_key_values"), empty, text, past, self.decoder.config)

    def _positions(self, kwargs: dict[str, Any], state: Forward, shift: Tensor | None) -> Tensor:
        """Positions of all tokens of the call under the policy; the shift from now on is noted in the state."""
        assert state.call is not None
        positions = all_positions(kwargs.get("position_ids"), state.call.past, kwargs["inputs_embeds"])
        state.shift = shift
        if shift is not None:
            positions = positions - shift[:, None].to(positions.device)
        if state.lowered is not None:
            positions = positions - state.lowered
            last = state.lowered[:, -1]
            state.shift = last if shift is None else last + shift.to(last.device)
        return positions

    def _mask(self, kwargs: dict[str, Any], call: Call, segment: Segment) -> Any:
        """What the decoder gets as `attention_mask` for its first segment."""
        layout = segment.layout(call)
        if layout.bias is not None:
            kinds = getattr(call.config, "layer_types", None)
            if kinds and len(set(kinds)) > 1:
                by_kind = {kind: list(kinds).index(kind) for kind in set(kinds)}
                embeds = kwargs["inputs_embeds"]
                return {kind: segment.mask(call, layer=layer, like=embeds) for kind, layer in by_kind.items()}
            return segment.mask(call, layer=0, like=kwargs["inputs_embeds"])
        if call.mask is None and call.cache is not None and not layout.has_fillers:
            return None
        return masks.prune_mask(call.mask, layout, call.cache, call.config, call.offsets)

    def _lengthen(self, state: Forward | None, kwargs: dict[str, Any], output: Any) -> Any:
        """Give the decoder's output its unpruned length back and write the pruning down on the cache."""
        cache = kwargs.get("past_key_values")
        if (ledger := ledger_of(cache)) is not None:
            ledger.inside = False
        if state is None or state.call is None:
            return None
        call, state.call = state.call, None
        kept_all = all(segment.keep is None for segment in state.segments)
        if output is None or (kept_all and not state.scoring and not state.steering):
            return None
        if cache is None and not isinstance(output, tuple):
            cache = output.get("past_key_values")
        if cache is not None and (not kept_all or ledger is None):
            ledger = state.ledger(call)
            record(cache, ledger)
        if ledger is not None and state.steering:
            ledger.head_scores, ledger.patterns = state.head_scores, state.patterns
            ledger.traffic += state.traffic
        if state.steering:
            state.owner.publish_traffic(state.traffic if ledger is None else ledger.traffic)
        if ledger is not None and state.scoring:
            eviction.end(state, call, cache, ledger)
        if kept_all:
            return None

        def lengthen(x: Any, segment: Segment) -> Any:
            keep = segment.keep
            if keep is None or not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] != keep.index.shape[1]:
                return x
            return gather(x, keep.source(length=call.length))

        def by_layer(states: tuple[Any, ...]) -> tuple[Any, ...]:
            seen = [state.segment_of(max(0, i - 1)) for i in range(len(states))]
            return tuple(lengthen(x, segment) for x, segment in zip(states, seen, strict=True))

        last = state.segments[-1]
        if isinstance(output, tuple):
            return tuple(by_layer(x) if isinstance(x, tuple) else lengthen(x, last) for x in output)
        if output.get("last_hidden_state") is not None:
            output["last_hidden_state"] = lengthen(output["last_hidden_state"], last)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = by_layer(output["hidden_states"])
        return output
