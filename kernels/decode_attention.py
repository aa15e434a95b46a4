"""Attention of one decoding step on the GPU; `tokenprune.ops.decode_attention` is the door and states the rule.

Six launches at most and no synchronisation with the host, each split over the KV length so that a single sequence
fills the device. Logits are kept, `[B, H, L]` in fp32: as many bytes as one channel in 64 of the keys, and with them
values can be chosen, probabilities summed over heads and flat rows computed again without reading a key twice.

1. `logits_kernel`: logits, and per split their maximum and their sum of exponentials.
2. `settle_kernel`: one program per head brings the splits together, finds out whether the distribution is flat, and
   searches the threshold of the values to read.
3. Where a threshold of progressive quantization is given, both once more: the low plane of the keys is added to the
   logits of flat heads. Programs of other heads end at once.
4. `values_kernel`: probabilities times values per split; of what no head of the group asks for, nothing is loaded.
5. `combine_kernel`: the sum over the splits.

The heads of a group share their loads; they are padded to 16 rows, the least that the tensor cores take, which costs
nothing where memory bounds the time. A vector is worked on in two halves, since that is how nibbles are packed; an
integer of a plane is exact in bf16 and fp16, so planes are multiplied on the tensor cores and scaled afterwards.

The logits that are kept are those before a soft cap, for the low plane adds to them; who takes their exponential caps
them first. A kernel is compiled for the cap, and without one as if there were none.
"""

from typing import Any

import tokenprune.kernels.decode_logits as decode_logits
import tokenprune.kernels.decode_values as decode_values
import torch
import triton
from tokenprune.kernels.common import shared_memory

_STREAMS = 2  # Programs per processor that keep its memory busy.


def _stored(x: Any) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Keys or values as the kernels take them: high plane, low plane and scale, and the strides of vectors and scales.

    A tensor takes the place of all three; what is no plane is never read as one.
    """
    if isinstance(x, torch.Tensor):
        x = x if x.stride(-1) == 1 else x.contiguous()
        return (x, x, x), (*x.stride()[:3], 0, 0, 0)
    high, low = x.high, x.low
    if high.stride() != low.stride() or high.stride(-1) != 1:
        high, low = high.contiguous(), low.contiguous()
    return (high, low, x.scale), (*high.stride()[:3], *x.scale.stride())


def blocks_for(width: int, element_size: int, shared: int) -> dict[str, int]:
    """Channels of half a vector, padded, and keys that are worked on at once.

    Args:
        width: of a head.
        element_size: bytes of a number of the query.
        shared: bytes of shared memory that a program may have.
    """
    half = max(16, triton.next_power_of_2((width + 1) // 2))
    block = 32 if element_size > 2 or half > 64 else 64
    if element_size > 2 and 17 * half * block > shared:  # Both halves in two stages, and the probabilities.
        block = 16
    return {"HALF": half, "BLOCK": block}


def _tile(query: torch.Tensor, group: int) -> dict[str, Any]:
    """What both halves of the step are compiled for: heads of a group, and blocks that fit on the device."""
    width, rows = query.shape[-1], max(16, triton.next_power_of_2(group))
    blocks = blocks_for(width, query.element_size(), shared_memory(query.device))
    return {"GROUP": group, "ROWS": rows, "WIDTH": width, **blocks, "enable_fp_fusion": True}


def _split(length: int, block: int, n_pairs: int, device: torch.device) -> tuple[int, int]:
    """Into how many splits a KV length goes so that the device is full, and how long they are."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    blocks = triton.cdiv(length, block)
    per_split = triton.cdiv(blocks, max(1, _STREAMS * processors // n_pairs))
    return triton.cdiv(blocks, per_split), per_split * block


def launch(
    query: torch.Tensor, key: Any, value: Any, scale: float, valid: torch.Tensor | None, heads: torch.Tensor | None,
    n_values: int | torch.Tensor | None, threshold: float | None, softcap: float | None, sizes: tuple[int, ...],
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Attend from one token.

    Args:
        query: `[B, H, 1, K]`, any float dtype.
        key: `[B, Hkv, L, K]`, of the query's dtype, or what has `high`, `low` `[B, Hkv, L, K / 2]` and `scale`.
        value: likewise.
        scale: factor of the logits.
        valid: `[B, Hkv, L]` bool of any strides, or None for all keys.
        heads: `[B, H]` bool, or None for all heads.
        n_values: values that a head reads, an int, int64 `[B]`, or None for all.
        threshold: largest probability below which a head reads the low planes; None to read both planes at once.
        softcap: bound of the logits, or None.
        sizes: bytes of a key as it is read first, of its low plane, both of a value, and of a dense key and value.

    Returns:
        The fields of `tokenprune.ops.DecodedStep`.
    """
    (keys, key_strides), (values, value_strides) = _stored(key), _stored(value)
    key_planes, value_planes = (not isinstance(x, torch.Tensor) for x in (key, value))
    (batch, n_heads, _, width), (groups, length) = query.shape, keys[0].shape[1:3]
    group = n_heads // groups
    tile = _tile(query, group) | {"HAS_VALID": valid is not None, "HAS_HEADS": heads is not None, "CAP": softcap}
    n_splits, split_length = _split(length, tile["BLOCK"], batch * groups, query.device)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    output, magnitude = torch.empty_like(query, memory_format=torch.contiguous_format), new(batch, n_heads)
    query = (query.float() if query.dtype == torch.float64 else query).contiguous()
    mask, mask_strides = (query, (0, 0, 0)) if valid is None else (valid, valid.stride())
    kept = query if heads is None else heads.contiguous().view(torch.int8)
    logits, top, total = new(batch, n_heads, length), new(batch, n_heads, n_splits), new(batch, n_heads, n_splits)
    anchor, norm, image, cut = (new(batch, n_heads, dtype=t) for t in (logits.dtype,) * 2 + (torch.int32,) * 2)
    flat = torch.zeros(batch, n_heads, dtype=torch.int8, device=query.device)
    partial = new(batch, n_heads, n_splits, width)
    scores = new(batch, groups, length) if heads is None else new(batch, groups, length).zero_()
    counts, read = new(batch, groups, n_splits, 2, dtype=torch.int32), new(3, batch, groups, dtype=torch.int64)
    valid_counts = read if valid is None else valid.sum(-1)
    row_counts, n_rows = (n_values, 0) if isinstance(n_values, torch.Tensor) else (counts, n_values or length)
    progressive = threshold is not None and threshold > 0
    splits, grid, of_heads = triton.next_power_of_2(n_splits), (n_splits, groups, batch), (n_heads, batch)

    def softmax(planes: int, *, again: bool) -> None:
        decide = progressive and not again
        decode_logits.logits_kernel[grid](
            query, *keys, mask, kept, flat, logits, top, total,
            n_heads, length, scale, split_length, *key_strides, *mask_strides, **tile, PLANES=planes, AGAIN=again,
        )  # fmt: skip
        decode_logits.settle_kernel[of_heads](
            top, total, logits, kept, flat, anchor, norm, image, cut, row_counts, n_rows, length, threshold or 0.0,
            n_splits, HAS_HEADS=heads is not None, DECIDE=decide, SELECT=n_values is not None and not decide,
            HAS_COUNTS=row_counts is n_values, SPLITS=splits, BLOCK=min(max(triton.next_power_of_2(length), 256), 8192),
            num_warps=4 if n_values is None else 8, enable_fp_fusion=True,
        )  # fmt: skip

    with torch.cuda.device_of(query):
        softmax((1 if threshold is not None else 2) if key_planes else 0, again=False)
        if progressive:
            softmax(1, again=True)
        decode_values.values_kernel[grid](
            logits, *values, mask, kept, flat, anchor, norm, image, cut,
            partial, scores, counts, n_heads, length, split_length, *value_strides, *mask_strides,
            **tile, PLANES=(3 if progressive else 1 if threshold is not None else 2) if value_planes else 0,
            WIDE=query.dtype == torch.float32, SELECT=n_values is not None,
        )  # fmt: skip
        decode_values.combine_kernel[of_heads](
            partial, kept, flat, counts, valid_counts, output, magnitude, read, length, n_splits, *sizes,
            GROUP=group, WIDTH=width, PADDED=triton.next_power_of_2(width), SPLITS=splits,
            HAS_VALID=valid is not None, HAS_HEADS=heads is not None, enable_fp_fusion=True,
        )  # fmt: skip
    return output, scores.sum(1), magnitude, flat.view(torch.bool), *read.unbind()
