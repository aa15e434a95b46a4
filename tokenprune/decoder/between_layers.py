"""Pruning between decoder layers: before a layer runs, tokens are dropped by the scores of the layers before it.

Hidden states, position embeddings, positions and masks of all later layers are shortened alike, so that their caches
hold that much less.
"""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenprune.decode.eviction import pass_over
from tokenprune.decoder.call import Call
from tokenprune.decoder.select import dropped_tokens
from tokenprune.decoder.state import Forward
from tokenprune.errors import InputError
from tokenprune.methods.base import Method
from tokenprune.reduction import Keep, gather, pack
from tokenprune.running import current
from tokenprune.session import Session
from tokenprune.signals import Budget, LayerSignals, Stage, Trace
from tokenprune.upstream.caches import layer_mask_sizes
from tokenprune.upstream.decoder_call import LayerCall, first_of_kwargs, with_mask
from tokenprune.validate import ask

SITE = "llm_layer"
_NONE = torch.empty(0, dtype=torch.int64, device="cpu")


def layer_hook(session: Session, layer: int, cuts: tuple[tuple[Method, Stage], ...]) -> Any:
    """The hook that runs before `layer`: drops tokens where it is time to, and fits the layer's arguments."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = current(Forward, session)
        if state is None or state.call is None:
            return None
        if state.passes_over:
            mask = _passing_mask(state, state.call, layer, first_of_kwargs(args, kwargs))
            return with_mask(module, args, kwargs, mask)
        shortened = None
        if cuts and state.visual:
            shortened = _cut(state, state.call, layer, cuts, first_of_kwargs(args, kwargs))
        segment = state.segment_of(layer)
        if segment is state.segments[0]:
            return None
        if segment.local is None:  # other slots alone
            mask = segment.mask(state.call, layer=layer, like=first_of_kwargs(args, kwargs))
            return with_mask(module, args, kwargs, mask)
        given, first = LayerCall.read(module, args, kwargs), state.segments[0].keep
        given.shorten(segment.local, n_tokens=state.call.length if first is None else first.index.shape[1])
        given.hidden = given.hidden if shortened is None else shortened.apply(given.hidden)
        given.mask = segment.mask(state.call, layer=layer, like=given.hidden)
        return given.arguments()

    return enter


def unpacking_hook(session: Session) -> Any:
    """The hook of a layer with flash attention, which takes gaps in positions for several sequences packed into a row.

    Positions are in the rotary embeddings by then, so the layer goes without.
    """

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = current(Forward, session)
        if state is None or state.call is None:
            return None
        given = LayerCall.read(module, args, kwargs)
        given.positions = None
        return given.arguments()

    return enter


def restoring_hook(session: Session) -> Any:
    """The hook after the last layer of a decoder that counts on its unpruned length right there."""

    def restore(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state = current(Forward, session)
        keep = None if state is None or state.call is None else state.segments[-1].keep
        if keep is None or state is None or state.call is None or output is None:
            return None
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = keep.restore(hidden, length=state.call.length)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    return restore


def _passing_mask(state: Forward, call: Call, layer: int, hidden: Tensor) -> Any:
    """The mask of a decoding step in which `layer` passes over some of the cache."""
    segment = state.segment_of(layer)
    whole = segment.mask(call, layer=layer, like=hidden)
    seen = pass_over(state, call, layer=layer)
    if segment.slots is not None:  # what a padding slot gets is hidden by the mask
        seen = gather(seen, segment.layout(call).columns.clamp(min=0).to(seen.device))
    n_keys, first = layer_mask_sizes(call.cache, 1, layer)
    if first or n_keys != seen.shape[1]:
        seen = pad(seen[:, first : first + n_keys], (0, max(0, first + n_keys - seen.shape[1])))
    if call.flash:
        return seen if whole is None else whole & seen.to(whole.device)
    seen = seen[:, None, None].to(hidden.device if whole is None else whole.device)
    if whole is None:
        return seen
    return whole & seen if whole.dtype == torch.bool else whole.masked_fill(~seen, torch.finfo(whole.dtype).min)


def _cut(state: Forward, call: Call, layer: int, cuts: tuple[tuple[Method, Stage], ...], hidden: Tensor) -> Keep | None:
    """Drop visual tokens before `layer`: what is kept of the tokens of `hidden`, None for all. Appends traces."""
    started = time.perf_counter()
    old, before = state.segment_of(layer), state.visual
    index = (call.all_rows if old.keep is None else old.keep.index).cpu()
    for method, stage in cuts:
        state.visual, trace = _choose(state, call, method, stage)
        state.traces.append(trace)
    dropped, local = dropped_tokens(before, state.visual, length=call.length), None
    if bool(dropped.any()) or state.owner.forced:
        real = ~gather(dropped, index)
        if old.keep is not None and old.keep.valid is not None:
            real &= old.keep.valid.cpu()
        if call.padding is not None and bool(dropped.any()):
            real &= gather(call.padding, index)
        local = pack(real, left=call.facts.recurrent).to(hidden.device)
        _insert(state, call, layer, local)
    spent = (time.perf_counter() - started) * 1e3 + state.probe_ms
    state.probe_ms = 0.0
    state.traces[-1] = replace(state.traces[-1], overhead_ms=spent)
    return local


def _choose(state: Forward, call: Call, method: Method, stage: Stage) -> tuple[tuple[Tensor, ...], Trace]:
    """Let one method choose among the visual tokens of every row; rows with equally many go to it together.

    Args:
        state: the forward.
        call: how the decoder was called.
        method: the method.
        stage: what it does here.

    Raises:
        InputError: a score is NaN or infinite.
    """
    before, kept = state.visual, list(state.visual)
    groups: dict[tuple[int, int], list[int]] = {}
    for row, visual in enumerate(before):
        n_keep = min(stage.count(state.entered[row]), len(visual))
        groups.setdefault((len(visual), n_keep), []).append(row)
    for (n_tokens, n_keep), rows in groups.items():
        if n_keep == n_tokens:
            continue
        if n_keep == 0:
            kept = [_NONE if row in rows else visual for row, visual in enumerate(kept)]
            continue
        visual = torch.stack([before[row] for row in rows])
        scores = torch.zeros_like(visual, dtype=torch.float32)  # of a method that asks for none
        if method.probe is not None:
            found = state.scores[method.probe]
            at = torch.tensor(rows, dtype=torch.int64, device=found.device)[:, None]
            scores = found[at, call.past + visual.to(found.device)]
            if not bool(scores.isfinite().all()):
                raise InputError(f"{SITE}: the attention of layer {stage.layer} holds NaN or infinite values")
        signals, budget = LayerSignals(stage.layer, scores), Budget(n_keep, n_keep)
        chosen = ask(method, SITE, signals, budget, shape=scores.shape).index
        for row, tokens, places in zip(rows, visual, chosen, strict=True):
            kept[row] = tokens[places]
    trace = Trace(
        SITE,
        stage.layer,
        method.name,
        n_in=tuple(map(len, before)),
        n_out=tuple(map(len, kept)),
        kept_indices=tuple(kept),
        visual_indices=before,
    )
    return tuple(kept), trace


def _insert(state: Forward, call: Call, layer: int, local: Keep) -> None:
    """From `layer` on the segments see what `local` keeps of the tokens that they saw so far."""
    old = state.segment_of(layer)
    if old.first < layer:
        place = state.segments.index(old) + 1
        state.segments.insert(place, replace(old, first=layer))
    for segment in state.segments:
        if segment.first >= layer:
            segment.then(local, call)
