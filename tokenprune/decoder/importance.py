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
from tokenprune.decoder.call import Call
from tokenprune.decoder.masks import valid_slots
from tokenprune.decoder.segments import Segment
from tokenprune.decoder.state import Forward
from tokenprune.errors import InputError
from tokenprune.hooks import Swap
from tokenprune.reduction import gather
from tokenprune.running import current
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
    state, layer = current(Forward), layer_index(module)
    call = None if state is None else state.call
    if state is None or call is None:
        return real_function(module)(module, query, key, value, mask, *args, **kwargs)
    plan = state.attention if state.steering else None
    probes = state.probes.get(layer, ()) if state.scoring or any(map(len, state.visual)) else ()
    stepped: tuple[Tensor, Tensor] | None = None
    if call.length == 1 and plan is not None and attention.needs_probabilities(state, plan, layer, query):
        scale, softcap = scale_of(query, kwargs), softcap_of(module, kwargs)
        stepped = attention.step(state, call, plan, layer, query, key, value, mask=mask, scale=scale, softcap=softcap)
    elif call.length == 1 and plan is None and not args and _can_step(state, module, query, kwargs):
        stepped = _step(state, call, layer, query, key, value, mask, scale_of(query, kwargs))
    if stepped is not None:
        output, scores = stepped
        for probe in probes:
            _note(state, call, layer, probe, scores)
        return output, None
    real, heads = real_function(module), None
    if plan is not None:
        heads = heads_of(state, plan, layer=layer)
        output = attention.with_kept_heads(state, call, real, module, heads, query, key, value, mask, *args, **kwargs)
    else:
        output = real(module, query, key, value, mask, *args, **kwargs)
    started, softcap = time.perf_counter(), softcap_of(module, kwargs)
    for probe in probes:
        scores = _scores(state, call, layer, probe, query, key, mask, scale_of(query, kwargs), softcap, heads)
        _note(state, call, layer, probe, scores)
    state.probe_ms += (time.perf_counter() - started) * 1e3
    return output


def _can_step(state: Forward, module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a decoding step is computed here, scores and all.

    On a CPU the keys are too long for reading them twice, once for the output and once for the scores, so that what
    sdpa would compute is computed here. It agrees to the rounding of fp32.
    """
    if not state.scoring or query.device.type != "cpu" or query.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu"):  # products would be rounded
        return False
    plain = all(one.reduction == "column_sum" and one.temperature == 1 for one in state.probes[layer_index(module)])
    return plain and is_plain(kwargs) and implementation_of(module) == "sdpa"


def _step(
    state: Forward, call: Call, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Output `[B, 1, H, K]` of a decoding step and what each key has gathered, `[B, n_keys]`; None where the keys are
    others than the mask's."""
    n_keys = state.segment_of(layer).n_keys(call)
    if key.shape[2] != (n_keys if mask is None else mask.shape[-1]):
        return None
    weights: Tensor = (query * scale).view(len(query), key.shape[1], -1, query.shape[3]) @ key.transpose(2, 3)
    if mask is not None:
        weights = weights.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else weights + mask
    weights = weights.softmax(3)
    scores = weights.detach().sum((1, 2))
    return (weights @ value).view(len(query), 1, query.shape[1], -1), scores if mask is None else scores[:, :n_keys]


def _note(state: Forward, call: Call, layer: int, probe: Probe, scores: Tensor) -> None:
    """Write `scores` `[B, n_keys]` of the last keys of `layer` down at their places in the unpruned sequence."""
    segment, total = state.segment_of(layer), call.past + call.length
    earlier = state.scores.get(probe) if probe.cumulative else None
    if segment.keep is None and segment.slots is None and scores.shape[1] == total:
        state.scores[probe] = scores if earlier is None else scores + earlier.to(scores.device)
        return
    earlier = scores.new_zeros(call.n_rows, total) if earlier is None else earlier.to(scores.device)
    layout = segment.layout(call)
    columns = layout.columns[:, -scores.shape[1] :].to(scores.device)
    if layout.has_padding_slots:
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
    flat = call.mask is None or call.padding_mask is not None
    given = not flat or segment.bias is not None or state.alive is not None
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


def _valid(call: Call, segment: Segment, n_new: int, n_keys: int, *, behind: bool) -> Tensor | None:
    """Which of the last `n_keys` keys are neither padding nor padding slots nor, unless these count (`behind`), stand
    behind the prompt; `[B, n_keys]` bool, None where all are so."""
    whole, layout = behind or not call.n_behind, segment.layout(call)
    if whole and call.flat and call.effective_mask is None and not layout.has_padding_slots:
        return None
    new = gather(call.real_tokens if whole else call.ranking, layout.rows.cpu())
    if segment.keep is not None and segment.keep.valid is not None:
        new = new & segment.keep.valid.cpu()
    if bool(new.all()) and n_keys == n_new:
        return None
    valid = valid_slots(call, layout, call.padding_mask)
    valid[:, -n_new:] &= new.to(valid.device)
    return valid[:, -n_keys:]
