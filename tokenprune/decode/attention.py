"""Attention with fewer heads and fewer values: what a method wants of every attention of a decoder.

Pruned heads are not computed in a prompt and give zeros where the output projection still takes them, which is what
leaving out their part of its input does (:mod:`tokenprune.decode.sliced_linear` does so). A decoding step runs
through :func:`tokenprune.ops.decode_attention`, which reads no keys and values of pruned heads, and of the values only
the ones with the largest probabilities; on a CPU, where heads are all that is pruned, through the model's own
attention.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune import ops
from tokenprune.decode.heads import Heads, heads_of, note_magnitude
from tokenprune.decode.traffic import Read, WholeRead
from tokenprune.decoder.call import Call
from tokenprune.decoder.masks import valid_slots
from tokenprune.decoder.state import Forward
from tokenprune.reduction import Keep, gather
from tokenprune.signals import AttentionPlan
from tokenprune.upstream.attention import RegroupedAttention, check_grouping, layer_index
from tokenprune.upstream.caches import layers_of, window_of


def step(
    state: Forward,
    call: Call,
    plan: AttentionPlan,
    layer: int,
    query: Tensor,
    key: Any,
    value: Any,
    *,
    mask: Any,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a decoding step: output `[B, 1, H, K]`, and each key's probabilities summed over the kept heads,
    `[B, L]`. A query of the kept heads alone gives an output of these."""
    n_keys = state.segment_of(layer).n_keys(call)
    layer_cache: Any = None if call.cache is None else layers_of(call.cache)[layer]
    threshold = plan.threshold if hasattr(layer_cache, "planes") else None
    if threshold is not None:
        key, value = layer_cache.planes()
    elif key.shape[2] > n_keys:  # a static cache is longer than what it holds
        key, value = key[:, :, :n_keys], value[:, :, :n_keys]
    if torch.is_autocast_enabled(query.device.type):  # dense attention would compute, and give back, in its dtype
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) if isinstance(x, Tensor) else x for x in (query, key, value))
    valid = _valid(state, call, layer, mask, n_keys)
    heads = heads_of(state, plan, layer=layer)
    n_query_heads = query.shape[1]
    found = ops.decode_attention(
        query if heads is None else heads.widen(query),
        key,
        value,
        scale=scale,
        valid=valid,
        heads=None if heads is None else heads.mask.to(query.device),
        n_values=_n_values(plan.values[layer], valid, n_keys),
        threshold=threshold,
        softcap=softcap,
        bias=_bias(state, call, layer, mask, n_keys),
    )
    note_magnitude(state, found.magnitude)
    n_heads = found.output.shape[1] if heads is None else heads.index.shape[1]
    state.reads.open.append(Read(found, _n_dense(call, layer), n_heads))
    output = found.output if heads is None or n_query_heads == heads.total else heads.take(found.output)
    return output.transpose(1, 2), found.scores


def _n_values(fraction: float, valid: Tensor | None, n_keys: int) -> int | Tensor | None:
    """How many values each head reads: a fraction of the valid keys, at least one; None for all."""
    if fraction == 1.0:
        return None
    if valid is None:
        return max(1, int(n_keys * fraction + 1e-6))
    return (valid.sum(dim=1).double() * fraction + 1e-6).long().clamp(min=1)


def _n_dense(call: Call, layer: int) -> int | Tensor:
    """Keys that `layer` of the unpruned model would see in a decoding step, over all rows."""
    mask, total = call.effective_mask, call.past + 1
    window = None if call.cache is None else window_of(layers_of(call.cache)[layer])
    if isinstance(mask, dict):
        mask = mask.get(call.facts.kind_of(layer), next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return call.n_rows * min(total, window or total)
    if mask.ndim == 4:
        return _seen(mask, call.n_rows).sum()
    return (mask[:, :total] != 0)[:, -(window or total) :].sum()


def needs_probabilities(state: Forward, plan: AttentionPlan, layer: int, query: Tensor) -> bool:
    """Whether a decoding step of `layer` has to run through :func:`step`.

    On a CPU, where all heads are read whole anyway, the attention of the model is faster where heads are all that is
    pruned and nobody ranks tokens.
    """
    return state.scoring or plan.values[layer] < 1.0 or plan.threshold is not None or query.device.type != "cpu"


def with_kept_heads(
    state: Forward,
    call: Call,
    real: Any,
    module: nn.Module,
    heads: Heads | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the attention function `real` gives, in a prompt with the kept heads computed alone; notes magnitudes.

    The output `[B, M, H, K]` has zeros for the other heads, unless `query` came without them.
    """
    step, total = call.length == 1, query.shape[1] if heads is None else heads.total
    if heads is None or step or any(True for _ in module.parameters(recurse=False)):  # parameters by head (sinks)
        # In a step, copying the keys of the kept heads would cost more than it saves.
        output, *rest = real(module, query if heads is None else heads.widen(query), key, value, mask, *args, **kwargs)
    else:
        check_grouping(module, heads.total // key.shape[1])
        few = heads.take(query)
        keys, values = heads.serving(key, value)
        alone = RegroupedAttention(module, few.shape[1] // keys.shape[1])
        output, *rest = real(alone, few, keys, values, mask, *args, **kwargs)
        rest = [heads.widen(x) if isinstance(x, Tensor) and x.ndim == 4 else x for x in rest]
    output = output if heads is None else heads.take(output, dim=2)
    segment = state.segment_of(layer_index(module))
    magnitude = output.float().abs().sum(dim=-1)
    if call.padding is not None or segment.keep is not None:
        magnitude = magnitude * _real_tokens(call, segment.keep).to(output.device)[:, :, None]
    magnitude = magnitude.sum(dim=1)
    note_magnitude(state, magnitude, heads)
    if step:
        state.reads.whole.append(_whole_read(state, call, layer_index(module), heads, mask, key, total=total))
    if heads is not None and query.shape[1] == heads.total:
        output = heads.widen(output, dim=2)
    return (output, *rest)


def _real_tokens(call: Call, keep: Keep | None) -> Tensor:
    """Which of the kept tokens of a call are no padding, `[B, M]` bool on the CPU."""
    if keep is None:
        return call.real_tokens
    real_tokens = gather(call.real_tokens, keep.index.cpu())
    return real_tokens if keep.valid is None else real_tokens & keep.valid.cpu()


def _whole_read(
    state: Forward, call: Call, layer: int, heads: Heads | None, mask: Any, key: Tensor, *, total: int
) -> WholeRead:
    """What a decoding step reads that reads whole keys and values; `total`: query heads of the layer."""
    n_keys, n_kv = state.segment_of(layer).n_keys(call), key.shape[1]
    valid = _valid(state, call, layer, mask, n_keys)
    n_valid = n_keys if valid is None else valid.sum(dim=1)
    n_used: int | Tensor = n_kv
    if heads is not None and heads.common is not None:
        n_used = len({head // (total // n_kv) for head in heads.common})
    elif heads is not None:
        n_used = heads.mask.view(len(heads.mask), n_kv, -1).any(dim=2).sum(dim=1)
    size = 2 * key.shape[-1] * key.element_size()

    def over_rows(count: int | Tensor) -> int | Tensor:
        return count.sum() * size if isinstance(count, Tensor) else count * call.n_rows * size

    return WholeRead(
        _n_dense(call, layer) * n_kv * size, over_rows(n_valid * n_kv), over_rows(n_valid * n_used), call.n_rows
    )


def _valid(state: Forward, call: Call, layer: int, mask: Any, n_keys: int) -> Tensor | None:
    """Which keys a decoding step sees, `[B, n_keys]` bool, None for all."""
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return _seen(mask, call.n_rows)[:, :n_keys]
    segment = state.segment_of(layer)
    if segment.is_whole(call):
        return None
    valid = valid_slots(call, segment.layout(call), call.padding_mask)
    return None if bool(valid.all()) else valid


def _bias(state: Forward, call: Call, layer: int, mask: Any, n_keys: int) -> Tensor | None:
    """What merged tokens add to the logits of a decoding step, `[B, n_keys]`, None where none does."""
    slots = state.segment_of(layer).slots
    if slots is None or slots.bias is None:
        return None
    bias: Tensor = mask[:, 0, 0, :n_keys].expand(call.n_rows, -1)
    return bias.masked_fill(~_seen(mask, call.n_rows)[:, :n_keys], 0.0)


def _seen(mask: Tensor, n_rows: int) -> Tensor:
    """Which keys the mask `[1 or B, 1, 1, L]` of a decoding step shows, `[B, L]` bool."""
    seen = mask[:, 0, 0]
    return (seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2).expand(n_rows, -1)
