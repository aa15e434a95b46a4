"""The generic adapter: prune what a parent module hands to its text decoder.

Two modules get hooks. The *root* (the module that takes `input_ids` and calls the decoder) opens the state of a
forward. The *decoder* gets its per-token arguments shortened before its forward runs, and its output back at the
unpruned length after it. What must outlive the forward sits on the KV cache (:mod:`cache`).
"""

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import InputError, OptionError
from tokenprune.models import masks
from tokenprune.models.base import Engine, Hook
from tokenprune.models.cache import Slots, check_cache, past_length, record, slots_of
from tokenprune.models.families import Family
from tokenprune.models.selection import SITE, keep_rows, padding_of, reduce_images, skipped
from tokenprune.models.visual import find_images, has_features
from tokenprune.reduction import Keep, gather
from tokenprune.signals import Trace


@dataclass
class _Forward:
    """State of one forward of one patched model."""

    owner: Engine
    inputs: dict[str, Any]
    outer: "_Forward | None"
    traces: list[Trace] = field(default_factory=list)
    plan: "_Plan | None" = None


@dataclass(frozen=True)
class _Plan:
    """How one forward is shortened.

    Attributes:
        keep: tokens that go on, `index` `[B, M]`.
        dropped: visual tokens that do not, `[B, length]` bool.
        past: tokens of the unpruned sequence before this call.
        length: tokens of the unpruned sequence in this call.
        shift: `[B]` how many positions the packed policy has taken out, this call included; None for original
            positions.
    """

    keep: Keep
    dropped: Tensor
    past: int
    length: int
    shift: Tensor | None = None


_CURRENT: ContextVar[_Forward | None] = ContextVar("tokenprune_forward", default=None)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


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
        if unknown := [site for site in sites if site != SITE]:
            raise OptionError(f"{self.family} models have the site {SITE!r} only, and {unknown} were asked for")
        rope = getattr(self.decoder.config, "rope_parameters", None) or {}
        mrope = self.row.mrope or "mrope_section" in rope
        if positions == "packed" and mrope:
            raise OptionError(
                f'positions="packed" was asked for, but {self.family} gives every visual token a time, a row and a '
                'column (M-RoPE), which cannot be renumbered one by one; use positions="original"'
            )

    def hooks(self, engine: Engine) -> list[Hook]:
        """The four hooks that make `engine` act on the model."""

        def open_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _CURRENT.set(_Forward(engine, bind(module, args, kwargs), _CURRENT.get()))

        def close_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            state = _CURRENT.get()
            if state is not None and state.owner is engine:
                _CURRENT.set(state.outer)
                if output is not None and state.traces:
                    engine.publish(tuple(state.traces))

        def shorten(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = _CURRENT.get()
            state = state if state is not None and state.owner is engine else None
            changed = self._shorten(engine, state, bind(module, args, kwargs))
            return None if changed is None else ((), changed)

        def lengthen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            state = _CURRENT.get()
            plan = state.plan if state is not None and state.owner is engine else None
            return self._lengthen(plan, bind(module, args, kwargs), output)

        return [
            Hook(self.root, "pre", open_forward),
            Hook(self.root, "post", close_forward),
            Hook(self.decoder, "pre", shorten),
            Hook(self.decoder, "post", lengthen),
        ]

    @contextmanager
    def probing(self, engine: Engine, inputs: dict[str, Any]) -> Iterator[None]:
        """Within the block calls of the decoder alone are pruned by `engine`, as if the root had been called with
        `inputs`."""
        _, _, shorten, lengthen = (hook.function for hook in self.hooks(engine))
        token = _CURRENT.set(_Forward(engine, inputs, None))
        handles = [
            self.decoder.register_forward_pre_hook(shorten, with_kwargs=True),
            self.decoder.register_forward_hook(lengthen, with_kwargs=True, always_call=True),
        ]
        try:
            yield
        finally:
            _CURRENT.reset(token)
            for handle in handles:
                handle.remove()

    def _shorten(self, engine: Engine, state: _Forward | None, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Shortened keyword arguments for the decoder, None where they may stay as they are."""
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        slots = slots_of(cache)
        if not isinstance(embeds, Tensor):
            if slots is None:
                return None
            raise InputError(
                "a pruned cache goes on through the model itself, not through input_ids given to its decoder"
            )
        started = time.perf_counter()
        plan = None
        if state is not None:
            state.plan = None
            plan = self._plan(engine, state, embeds, kwargs)
            state.inputs = {}  # no hook runs after a KeyboardInterrupt; this state may stay, the inputs should not
        if plan is None and slots is None:
            return None
        past, (n_rows, length) = past_length(cache), embeds.shape[:2]
        keep = None if plan is None else plan.keep
        rows = torch.arange(length, device=embeds.device).expand(n_rows, -1) if keep is None else keep.index
        positions = _positions(kwargs.get("position_ids"), past, embeds)
        changed = {
            **kwargs,
            "attention_mask": self._mask(kwargs, rows, past, positions, keep),
            "position_ids": positions,
        }
        shift = None if slots is None else slots.shift
        if shift is not None:
            changed["position_ids"] = positions - shift[:, None].to(positions.device)
        if plan is not None and state is not None:
            if engine.positions == "packed":
                lowered = plan.dropped.cumsum(dim=1)
                changed["position_ids"] = changed["position_ids"] - lowered
                shift = lowered[:, -1] + (0 if shift is None else shift.to(lowered.device))
            _shorten_tensors(changed, plan.keep)
            state.plan = replace(plan, shift=shift)
            earlier = sum(trace.overhead_ms for trace in state.traces[:-1])
            spent = (time.perf_counter() - started) * 1e3
            state.traces[-1] = replace(state.traces[-1], overhead_ms=spent - earlier)
        if slots is not None:
            slots.inside = True
        return changed

    def _plan(self, engine: Engine, state: _Forward, embeds: Tensor, kwargs: dict[str, Any]) -> _Plan | None:
        """Run the methods on the images of this forward; None where no token is dropped. Appends traces."""
        reducers, cache = engine.reducers(SITE), kwargs.get("past_key_values")
        if not engine.active or not reducers:
            return None
        past, (n_rows, length) = past_length(cache), embeds.shape[:2]
        images = []
        if embeds.numel() and has_features(state.inputs):
            images = find_images(self.root, self.row, state.inputs, kwargs.get("position_ids"))
        if not images:
            if length > 1 or not past:  # a decoding step is no news
                state.traces += skipped(reducers, "no image in this call" if embeds.numel() else "empty input")
            return None
        check_cache(cache)
        left = images
        for reducer in reducers:
            left, trace = reduce_images(left, reducer, embeds)
            state.traces.append(trace)
        if not engine.forced and state.traces[0].n_in == state.traces[-1].n_out:
            return None
        mask = kwargs.get("attention_mask")
        padding = padding_of(
            mask, past=past, length=length, offset=masks.offset_of(mask, cache, self.decoder.config, length)
        )
        keep, dropped = keep_rows(images, left, padding, shape=(n_rows, length), device=embeds.device)
        return _Plan(keep, dropped, past, length)

    def _mask(self, kwargs: dict[str, Any], rows: Tensor, past: int, positions: Tensor, keep: Keep | None) -> Any:
        """What the decoder gets as `attention_mask`; `rows` `[B, M]` are the tokens of this call that go on."""
        mask, cache, config = kwargs.get("attention_mask"), kwargs.get("past_key_values"), self.decoder.config
        slots, length = slots_of(cache), kwargs["inputs_embeds"].shape[1]
        has_fillers = (keep is not None and keep.valid is not None) or (slots is not None and slots.has_fillers)
        flat = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        slides = flat and masks.slides(config, cache, total=past + length)
        if mask is None and cache is not None and not has_fillers and not slides:
            return None
        layout = masks.Layout(rows, _columns(slots, keep, rows, past), past, length)
        if slides:
            text = positions[0] if positions.ndim == 3 else positions
            mask = masks.dense_mask(config, mask, cache, embeds=kwargs["inputs_embeds"], positions=text)
        return masks.prune_mask(mask, layout, cache, config, has_fillers=has_fillers)

    def _lengthen(self, plan: _Plan | None, kwargs: dict[str, Any], output: Any) -> Any:
        """Give the decoder's output its unpruned length back and write the pruning down on the cache."""
        cache = kwargs.get("past_key_values")
        slots = slots_of(cache)
        if slots is not None:
            slots.inside = False
        if output is None or plan is None:
            return None
        if cache is None and not isinstance(output, tuple):
            cache = output.get("past_key_values")
        if cache is not None:
            record(cache, plan.keep, past=plan.past, length=plan.length, shift=plan.shift)
        n_kept, source = plan.keep.index.shape[1], plan.keep.source(length=plan.length)

        def lengthen(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(lengthen, x))
            return gather(x, source) if isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] == n_kept else x

        if isinstance(output, tuple):
            return lengthen(output)
        for name in ("last_hidden_state", "hidden_states"):
            if output.get(name) is not None:
                output[name] = lengthen(output[name])
        return output


def _columns(slots: Slots | None, keep: Keep | None, rows: Tensor, past: int) -> Tensor:
    """Position in the unpruned sequence of every slot, `[B, P + M]`, -1 where a slot only fills a row up."""
    new = rows + past
    if keep is not None and keep.valid is not None:
        new = new.masked_fill(~keep.valid, -1)
    if slots is None:
        earlier = torch.arange(past, device=rows.device).expand(rows.shape[0], -1)
    else:
        earlier = slots.columns(n_slots=past - slots.dropped).to(rows.device)
    return torch.cat([earlier, new], dim=1)


def _positions(positions: Tensor | None, past: int, embeds: Tensor) -> Tensor:
    """Positions of all tokens of the call, `[B, L]` or `[3 or 4, B, L]`; where none are given, those the decoder
    would take."""
    n_rows, length = embeds.shape[:2]
    if positions is None:
        positions = torch.arange(past, past + length, device=embeds.device)[None]
    shape = (n_rows, length) if positions.ndim == 2 else (positions.shape[0], n_rows, length)
    return positions.expand(shape)


def _shorten_tensors(kwargs: dict[str, Any], keep: Keep) -> None:
    """Shorten every per-token argument of the decoder, in place of the dict. Masks over keys are not among them."""
    embeds = kwargs["inputs_embeds"]
    per_token = embeds.shape[:2]
    visual = kwargs.get("visual_pos_masks")
    planes = kwargs.get("deepstack_visual_embeds")
    if (
        visual is not None and planes is not None
    ):  # DeepStack: a feature plane has one row for each visual token of the batch
        number = (visual.flatten().cumsum(0) - 1).view_as(visual)
        left = keep.apply(visual)
        left = left if keep.valid is None else left & keep.valid.to(left.device)
        rows = keep.apply(number)[left]
        kwargs["deepstack_visual_embeds"] = [plane[rows.to(plane.device)] for plane in planes]
        kwargs["visual_pos_masks"] = left
    for name, value in kwargs.items():
        if name in ("attention_mask", "past_key_values", "visual_pos_masks", "deepstack_visual_embeds"):
            continue
        if name == "position_ids":
            kwargs[name] = keep.apply(value, dim=value.ndim - 1)
        elif isinstance(value, Tensor) and value.shape[:2] == per_token:
            kwargs[name] = keep.apply(value)
