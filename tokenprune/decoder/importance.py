"""Importance scores out of a layer's attention, whatever its implementation.

One function is registered as an attention function (:mod:`tokenprune.upstream.attention`), which probed attention
modules see as their implementation. It calls the real implementation for the output, so that this stays bit-identical,
and computes the scores beside it from the queries and keys; decoding steps on a CPU get both from one computation.
"""

import functools
import time
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune import ops
from tokenprune.decode import attention
from tokenprune.decode.heads import Heads, heads_of
from tokenprune.decoder.state import CURRENT, Call, Forward, Segment
from tokenprune.engine import Swap
from tokenprune.errors import InputError
from tokenprune.reduction import gather
from tokenprune.signals import Probe
from tokenprune.upstream.attention import (
    implementation_of,
    is_plain,
    layer_index,
    proxy_of,
    real_function,
    register,
    scale_of,
    softcap_of,
)


@functools.cache
def _outside_graphs() -> Any:
    """:func:`attend` outside of any compiled graph; made when it is wanted, for it imports torch's compiler."""
    disable: Any = torch.compiler.disable
    return disable(attend)


def swap(module: nn.Module) -> Swap:
    """What makes an attention module call :func:`attend`."""
    register(_outside_graphs())
    return Swap(module, *proxy_of(module))


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
    """The attention function of a probed module: the real one, and the scores that were asked for beside it."""
    real = real_function(module)
    state, layer = CURRENT.get(), layer_index(module)
    if state is None or state.call is None:
        return real(module, query, key, value, mask, *args, **kwargs)
    if state.steering and state.attention is not None and state.call.length == 1:
        stepped, scores = attention.step(
            state, state.call, state.attention, layer, query, key, value, mask=mask, scale=scale_of(query, kwargs),
            softcap=softcap_of(real, kwargs),
        )  # fmt: skip
        for probe in state.probes.get(layer, ()) if state.scoring else ():
            _note(state, state.call, layer, probe, scores)
        return stepped, None
    heads = None
    if state.steering and state.attention is not None:
        heads = heads_of(state, state.attention, layer=layer)
        output = attention.prompt(state, state.call, real, module, heads, query, key, value, mask, *args, **kwargs)
    elif args or (known := _step(state, state.call, layer, module, query, key, value, mask, kwargs)) is None:
        output = real(module, query, key, value, mask, *args, **kwargs)
    else:
        return known, None
    if state.scoring or any(map(len, state.visual)):
        started, softcap = time.perf_counter(), softcap_of(real, kwargs)
        for probe in state.probes.get(layer, ()):
            scores = _scores(state, state.call, layer, probe, query, key, mask, scale_of(query, kwargs), softcap, heads)
            _note(state, state.call, layer, probe, scores)
        state.probe_ms += (time.perf_counter() - started) * 1e3
    return output


def _step(
    state: Forward,
    call: Call,
    layer: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The output `[B, 1, H, K]` of a decoding step, whose scores are noted; None where it has to come from elsewhere.

    On a CPU the keys are too long for reading them twice, once for the output and once for the scores, so that what
    sdpa would compute is computed here. It agrees to the rounding of fp32.
    """
    probes = state.probes.get(layer, ())
    plain = all(one.reduction == "column_sum" and one.temperature == 1 for one in probes)
    if not state.scoring or not plain or query.shape[2] > 1 or query.device.type != "cpu":
        return None
    if torch.is_autocast_enabled("cpu"):  # products would be rounded
        return None
    if implementation_of(module) != "sdpa" or not is_plain(kwargs) or query.dtype != torch.float32:
        return None
    slots = state.segment_of(layer).slots
    n_keys = call.past + 1 - (0 if slots is None else slots.dropped)
    if key.shape[2] != (n_keys if mask is None else mask.shape[-1]):
        return None
    scale = scale_of(query, kwargs)
    grouped = query.view(len(query), key.shape[1], -1, query.shape[3])
    weights: Tensor = (grouped * scale) @ key.transpose(2, 3)
    if mask is not None:
        weights = weights.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else weights + mask
    weights = weights.softmax(3)
    scores = weights.detach().sum((1, 2))[:, :n_keys]
    for probe in probes:
        _note(state, call, layer, probe, scores)
    return (weights @ value).flatten(1, 2)[:, None]


def _note(state: Forward, call: Call, layer: int, probe: Probe, scores: Tensor) -> None:
    """Write `scores` `[B, n_keys]` of the last keys of `layer` down at their places in the unpruned sequence."""
    segment, total = state.segment_of(layer), call.past + call.length
    earlier = state.scores.get(probe) if probe.cumulative else None
    if segment.keep is None and segment.slots is None and scores.shape[1] == total:
        state.scores[probe] = scores if earlier is None else scores + earlier.to(scores.device)
        return
    earlier = scores.new_zeros(call.n_rows, total) if earlier is None else earlier.to(scores.device)
    slots = None if segment.keep is not None else segment.slots
    n_tail = 0 if slots is None or slots.has_fillers else scores.shape[1] - slots.index.shape[1]
    if slots is not None and n_tail > 0 and scores.shape[1] == total - slots.dropped:
        columns = slots.index.to(scores.device)
        earlier[:, -n_tail:] += scores[:, -n_tail:]  # these stand by themselves
        scores = scores[:, :-n_tail]
    else:
        layout = segment.layout(call)
        columns = layout.columns[:, -scores.shape[1] :].to(scores.device)
        if layout.has_fillers:
            scores, columns = scores.masked_fill(columns < 0, 0.0), columns.clamp(min=0)
    state.scores[probe] = earlier.scatter_add_(1, columns, scores)


def _scores(
    state: Forward,
    call: Call,
    layer: int,
    probe: Probe,
    query: Tensor,
    key: Tensor,
    mask: Any,
    scale: float,
    softcap: float | None,
    heads: Heads | None,
) -> Tensor:
    """Importance of the last keys that `layer` sees to its kept heads, `[B, n_keys]` fp32; those of this call are among
    them."""
    segment, n_new = state.segment_of(layer), query.shape[2]
    n_past = call.past if segment.slots is None else call.past - segment.slots.dropped
    key = key[:, :, : n_past + n_new]  # a static cache is longer than what it holds
    if probe.reduction == "pagerank":  # among the tokens of this call: the walk needs a row for every column
        key = key[:, :, -n_new:]
    n_keys = key.shape[2]
    if len(query) != call.n_rows:
        raise InputError(f"layer {layer} was called with {len(query)} rows instead of {call.n_rows}")
    if heads is not None:
        query, (key,) = heads.take(query), heads.serving(key)
    seen = None
    given = not _is_flat(call.mask) or segment.bias is not None or state.alive is not None
    if given and isinstance(mask, Tensor) and mask.ndim == 4:  # it says more than padding and causality
        seen = mask[..., : n_past + n_new][..., -n_keys:]
    return ops.attention_importance(
        query,
        key,
        scale=scale,
        valid=_valid(call, segment, n_new, n_keys, behind=state.scoring),
        seen=seen,
        reduction=probe.reduction,
        temperature=probe.temperature,
        softcap=softcap,
    )


def _is_flat(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)


def _valid(call: Call, segment: Segment, n_new: int, n_keys: int, *, behind: bool) -> Tensor | None:
    """Which of the last `n_keys` keys are neither padding nor fill a row up nor, unless these count (`behind`), stand
    behind the prompt; `[B, n_keys]` bool, None where all are so."""
    whole = behind or not call.n_behind
    if whole and call.flat and call.effective_mask is None and not segment.layout(call).has_fillers:
        return None
    rows = call.all_rows if segment.keep is None else segment.keep.index
    device = rows.device
    new = gather(call.real_tokens if whole else call.ranking, rows.cpu())
    if segment.keep is not None and segment.keep.valid is not None:
        new = new & segment.keep.valid.cpu()
    if bool(new.all()) and n_keys == n_new:
        return None
    columns = segment.layout(call).columns
    valid = columns >= 0
    valid[:, -n_new:] &= new.to(device)
    if isinstance(call.mask, Tensor) and call.mask.ndim == 2:
        valid &= gather(call.mask.to(device, torch.bool), columns.clamp(min=0))
    return valid[:, -n_keys:]
