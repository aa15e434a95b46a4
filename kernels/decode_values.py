"""The second half of a decoding step on the GPU, from its softmax on; `decode_attention` describes the whole."""

import triton
import triton.language as tl
from tokenprune.kernels.decode_logits import capped, existing, kept_rows, load_halves, load_plane, product
from tokenprune.kernels.top_k_select import image_of


@triton.jit
def _accumulate(p, a, b, first, second, WIDE: tl.constexpr):
    """Add probabilities times both halves of some values; integers of planes go as bf16 unless all is `WIDE`."""
    if not WIDE and a.dtype == tl.float32:
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    p = p.to(a.dtype)
    return product(p, a, first), product(p, b, second)


@triton.jit
def _normalization(anchor, norm, row, kept):
    """What is subtracted from the logits of some heads, and what their exponentials are multiplied with.

    The latter is 0 where no key is valid, and NaN where a logit is.
    """
    weight = tl.load(norm + row, mask=kept, other=0.0)
    inverse = tl.where(weight == 0.0, 0.0, 1.0 / tl.where(weight == 0.0, 1.0, weight))
    return tl.load(anchor + row, mask=kept, other=0.0), inverse


@triton.jit
def _exponential(logit, peak, chosen, CAP: tl.constexpr):
    """Of capped logits less the highest one; 0 where a head is not kept or a key not valid, whose logits are -inf."""
    p = tl.exp(capped(logit, CAP) - peak[:, None])
    if CAP is not None:
        p = tl.where(chosen, p, 0.0)
    return p


@triton.jit
def _largest(logit, token, least, last):
    """Which logits are among those that `settle_kernel` found to be the largest."""
    image = image_of(logit)
    tied = (image == least[:, None]) & (token[None, :] <= last[:, None])
    return (image > least[:, None]) | tied


@triton.jit
def values_kernel(
    logits, value, low, value_scale, valid, heads, flat, anchor, norm, image, cut, partial, scores, counts,
    n_heads, length, split_length, value_b, value_g, value_n, scale_b, scale_g, scale_n, valid_b, valid_g, valid_n,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    PLANES: tl.constexpr, WIDE: tl.constexpr, HAS_VALID: tl.constexpr, HAS_HEADS: tl.constexpr, SELECT: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Of one split: `partial [B, H, splits, K]`, `scores [B, Hkv, L]`, and how much was read.

    `PLANES`: 0 none, 1 high, 2 both, 3 high, and the low one for what flat heads read. `counts [B, Hkv, splits, 2]`:
    values read, values read from both planes. Where a whole group is pruned, its scores are left as they were.
    """
    split, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    member, channel, n_splits = tl.arange(0, ROWS), tl.arange(0, HALF), tl.num_programs(0)
    base, pair = batch * n_heads + group * GROUP, batch * tl.num_programs(1) + group
    kept = kept_rows(heads, heads, base, member, GROUP, HAS_HEADS, False)
    peak, inverse = _normalization(anchor, norm, base + member, kept)
    if SELECT:
        least = tl.load(image + base + member, mask=kept, other=-1).to(tl.uint32, bitcast=True)
        last = tl.load(cut + base + member, mask=kept, other=-1)
    if PLANES == 3:
        again = tl.load(flat + base + member, mask=kept, other=0) != 0
    start_of_value, start_of_scale = batch * value_b + group * value_g, batch * scale_b + group * scale_g
    first, second = tl.zeros([ROWS, HALF], tl.float32), tl.zeros([ROWS, HALF], tl.float32)
    n_read, n_low = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    end = tl.where(tl.max(kept.to(tl.int32), axis=0) > 0, tl.minimum((split + 1) * split_length, length), 0)
    for start in range(split * split_length, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = existing(valid, batch, group, token, end, valid_b, valid_g, valid_n, HAS_VALID)
        chosen = kept[:, None] & inside[None, :]
        place = (base + member)[:, None] * length + token[None, :]
        logit = tl.load(logits + place, mask=chosen, other=float("-inf"))
        p, read = _exponential(logit, peak, chosen, CAP), inside
        score = tl.where(inside, tl.sum(p * inverse[:, None], axis=0), 0.0)
        tl.store(scores + pair * length + token, score, mask=token < end)
        if SELECT:
            chosen = chosen & _largest(logit, token, least, last)
            p = tl.where(chosen, p, 0.0)
            read = tl.max(chosen.to(tl.int32), axis=0) > 0
        n_read += tl.sum(read.to(tl.int32), axis=0)
        if PLANES == 0:
            a, b = load_halves(value, start_of_value, token, read, channel, value_n, WIDTH)
        else:
            place = start_of_scale + token.to(tl.int64) * scale_n
            p = p * tl.load(value_scale + place, mask=read, other=0.0)[None, :]
            a, b = load_plane(value, start_of_value, token, read, channel, value_n, WIDTH, 16)
        if PLANES == 3:
            chosen = chosen & again[:, None]
            read = tl.max(chosen.to(tl.int32), axis=0) > 0
            n_low += tl.sum(read.to(tl.int32), axis=0)
        if PLANES >= 2:
            c, d = load_plane(low, start_of_value, token, read, channel, value_n, WIDTH, 1)
        if PLANES == 2:
            a, b = a + c, b + d
        if PLANES == 3:
            first, second = _accumulate(tl.where(chosen, p, 0.0), c, d, first, second, WIDE)
        first, second = _accumulate(p, a, b, first, second, WIDE)

    half: tl.constexpr = (WIDTH + 1) // 2
    pointer = partial + ((base + member) * n_splits + split)[:, None] * WIDTH + channel[None, :]
    tl.store(pointer, first * inverse[:, None], mask=kept[:, None] & (channel < half)[None, :])
    tl.store(pointer + half, second * inverse[:, None], mask=kept[:, None] & (channel < WIDTH - half)[None, :])
    pointer = counts + (pair * n_splits + split) * 2
    tl.store(pointer, n_read)
    tl.store(pointer + 1, n_low)


@triton.jit
def combine_kernel(
    partial, heads, flat, counts, valid_counts, output, magnitude, read, length, n_splits,
    key_row, key_low, value_row, value_low, dense_row,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_HEADS: tl.constexpr,
):  # fmt: skip
    """Of one head: `output [B, H, K]` and `magnitude [B, H]`; of its group: the bytes `read [3, B, Hkv]`."""
    head, batch, n_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    row = batch.to(tl.int64) * n_heads + head
    channel, split = tl.arange(0, PADDED), tl.arange(0, SPLITS)
    n_channels = WIDTH
    if HAS_HEADS:
        n_channels = WIDTH * tl.load(heads + row).to(tl.int32)  # None of a pruned head, whose sums are not written.
    result = tl.zeros([PADDED], tl.float32)
    for i in range(n_splits):
        result += tl.load(partial + (row * n_splits + i) * WIDTH + channel, mask=channel < n_channels, other=0.0)
    tl.store(output + row * WIDTH + channel, result, mask=channel < WIDTH)
    tl.store(magnitude + row, tl.sum(tl.abs(result), axis=0))
    if head % GROUP == 0:
        any_kept = tl.zeros([], tl.int64)
        any_flat = tl.zeros([], tl.int64)
        for i in range(GROUP):
            any_flat |= (tl.load(flat + row + i) != 0).to(tl.int64)
            if HAS_HEADS:
                any_kept |= (tl.load(heads + row + i) != 0).to(tl.int64)
            else:
                any_kept |= 1
        pair, n_pairs = row // GROUP, tl.num_programs(1) * n_heads // GROUP
        pointer, mask = counts + (pair * n_splits + split) * 2, split < n_splits
        n_read = tl.sum(tl.load(pointer, mask=mask, other=0), axis=0).to(tl.int64)
        n_low = tl.sum(tl.load(pointer + 1, mask=mask, other=0), axis=0).to(tl.int64)
        n_valid = tl.full([], 0, tl.int64) + length
        if HAS_VALID:
            n_valid = tl.load(valid_counts + pair)
        tl.store(read + pair, n_valid * any_kept * (key_row + any_flat * key_low))
        tl.store(read + n_pairs + pair, n_read * value_row + n_low * value_low)
        tl.store(read + 2 * n_pairs + pair, n_valid * dense_row)
