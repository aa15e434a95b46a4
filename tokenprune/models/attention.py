"""Attention with fewer heads and fewer values: what a method wants of every attention of a decoder.

Heads that have left give zeros in every forward, which is what leaving out their part of the output projection's input
does. A decoding step runs through :func:`tokenprune.ops.decode_attention`, which reads no keys and values of heads that
have left, and of the values only the ones with the largest probabilities.
"""

from typing import Any

import torch
from torch import Tensor

from tokenprune import ops
from tokenprune.models.forward import Call, Forward
from tokenprune.reduction import gather
from tokenprune.signals import AttentionPlan, Traffic


def kept_heads(state: Forward, plan: AttentionPlan, *, layer: int, n_heads: int) -> Tensor | None:
    """Which heads `layer` keeps, `[B, H]` bool: those with the highest scores among those that the layer before kept;
    None for all."""
    n_keep = max(1, int(n_heads * plan.heads[layer] + 1e-6))
    if n_keep == n_heads or state.head_scores is None:
        return None
    kept = ops.top_k_select(state.head_scores, k=min(n_keep, n_heads), valid=_enough(state.heads, n_keep))
    mask = torch.zeros(state.head_scores.shape, dtype=torch.bool, device=kept.device).scatter_(1, kept, True)
    state.heads = mask
    return mask


def _enough(valid: Tensor | None, n_keep: int) -> Tensor | None:
    """`valid` unless a row has fewer than `n_keep` left."""
    return valid if valid is None or bool((valid.sum(dim=1) >= n_keep).all()) else None


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
) -> tuple[Tensor, Tensor]:
    """Attention of a decoding step: output `[B, 1, H, K]`, and each key's probabilities summed over heads, `[B, L]`."""
    n_keys = call.past + 1 - (slots.dropped if (slots := state.segment_of(layer).slots) is not None else 0)
    key, value = key[:, :, :n_keys], value[:, :, :n_keys]
    valid = _valid(state, call, layer, mask, n_keys)
    heads = kept_heads(state, plan, layer=layer, n_heads=query.shape[1])
    n_valid = torch.full((len(query),), n_keys, device=query.device) if valid is None else valid.sum(dim=1)
    n_values = None
    if plan.values[layer] < 1.0:
        n_values = (n_valid * plan.values[layer] + 1e-6).long().clamp(min=1)
    found = ops.decode_attention(query, key, value, scale=scale, valid=valid, heads=heads, n_values=n_values)
    note_magnitude(state, found.magnitude)
    n_real = n_valid * 0 + call.past + 1 if state.padding is None else state.padding.sum(dim=1).to(n_valid.device)
    state.traffic += _count(found, n_real=n_real, n_valid=n_valid)
    return found.output.transpose(1, 2), found.scores


def _count(found: ops.DecodedStep, *, n_real: Tensor, n_valid: Tensor) -> Traffic:
    """Bytes of one step of one layer; `n_real` and `n_valid` `[B]`: the row's tokens and those that its cache holds."""
    after_tokens = found.dense_bytes.double()
    dense = after_tokens * (n_real / n_valid.clamp(min=1))[:, None]
    after_heads = after_tokens * (found.key_bytes > 0)
    bits = found.key_bytes.double() / (after_heads / 2).clamp(min=1)
    after_values = after_heads / 2 + found.value_bytes / bits.where(bits > 0, torch.ones_like(bits))
    read = found.key_bytes + found.value_bytes
    return Traffic(
        dense=float(dense.sum()),
        tokens=float(after_tokens.sum()),
        heads=float(after_heads.sum()),
        values=float(after_values.sum()),
        read=float(read.sum()),
        steps=len(found.output),
        recomputed=float(found.recomputed.float().mean()),
    )


def note_magnitude(state: Forward, magnitude: Tensor) -> None:
    """Add the magnitudes `[B, H]` of a layer's heads to their scores."""
    earlier = state.head_scores
    state.head_scores = magnitude if earlier is None else earlier.to(magnitude.device) + magnitude


def prompt(state: Forward, call: Call, plan: AttentionPlan, layer: int, output: Tensor) -> Tensor:
    """The output `[B, M, H, K]` of a prompt's attention without the heads that have left; notes their magnitudes."""
    heads = kept_heads(state, plan, layer=layer, n_heads=output.shape[2])
    if heads is not None:
        output = output * heads[:, None, :, None].to(output)
    keep = state.segment_of(layer).keep
    real = torch.ones(call.n_rows, call.length, dtype=torch.bool) if call.padding is None else call.padding
    if keep is not None:
        real = gather(real, keep.index.cpu())
        real = real if keep.valid is None else real & keep.valid.cpu()
    magnitude = output.float().abs().sum(dim=-1)
    note_magnitude(state, (magnitude * real.to(output.device)[:, :, None]).sum(dim=1))
    return output


def _valid(state: Forward, call: Call, layer: int, mask: Any, n_keys: int) -> Tensor | None:
    """Which keys a decoding step sees, `[B, n_keys]` bool, None for all."""
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen = mask[:, 0, 0, :n_keys]
        return (seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2).expand(call.n_rows, -1)
    columns = state.segment_of(layer).layout(call).columns
    valid = columns >= 0
    if isinstance(call.mask, Tensor) and call.mask.ndim == 2:
        valid = valid & gather(call.mask.to(valid.device, torch.bool), columns.clamp(min=0))
    return None if bool(valid.all()) else valid
