"""The first half of a decoding step on the GPU, up to its softmax; `decode_attention` describes the whole."""

import triton
import triton.language as tl
from tokenprune.kernels.common import operand, taking_part
from tokenprune.kernels.top_k_select import image_of, search


@triton.jit
def product(a, b, total):
    """`a @ b + total` in fp32, with operands of a half type on the tensor cores."""
    return tl.dot(operand(a), operand(b), total, input_precision="ieee")


@triton.jit
def capped(logit, CAP: tl.constexpr):
    """`CAP * tanh(logit / CAP)` to a few units in the last place of fp32; the logits themselves if `CAP` is None.

    The exponential is that of a negative number. Near 0, where a difference of it would cancel, a series replaces it.
    """
    result = logit
    if CAP is not None:
        x = logit * (1.0 / CAP)
        square, decay = x * x, tl.exp(-2.0 * tl.abs(x))
        series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
        far = tl.where(x < 0.0, -CAP, CAP) * ((1.0 - decay) / (1.0 + decay))
        result = tl.where(square < 0.04, logit * series, far)
    return result


@triton.jit
def kept_rows(heads, again, base, member, GROUP: tl.constexpr, HAS_HEADS: tl.constexpr, AGAIN: tl.constexpr):
    """Which rows of a padded group are heads that take part."""
    kept = taking_part(heads, base + member, member < GROUP, HAS_HEADS)
    return taking_part(again, base + member, kept, AGAIN)


@triton.jit
def existing(valid, batch, group, token, end, valid_b, valid_g, valid_n, HAS_VALID: tl.constexpr):
    place = batch * valid_b + group * valid_g + token.to(tl.int64) * valid_n
    return taking_part(valid, place, token < end, HAS_VALID)


@triton.jit
def load_halves(x, row, token, inside, channel, x_n, WIDTH: tl.constexpr):
    """Both halves `[BLOCK, HALF]` of some vectors; `row` is where their KV head starts."""
    half: tl.constexpr = (WIDTH + 1) // 2
    pointer = x + row + token.to(tl.int64)[:, None] * x_n + channel[None, :]
    first = tl.load(pointer, mask=inside[:, None] & (channel < half)[None, :], other=0)
    second = tl.load(pointer + half, mask=inside[:, None] & (channel < WIDTH - half)[None, :], other=0)
    return first, second


@triton.jit
def load_plane(x, row, token, inside, channel, x_n, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """Both halves in fp32 of what a plane represents before it is scaled; `STEP` is 16 for the high one, 1 for the low.

    Nibbles are counted from their middle, and the whole from 128: so the low plane adds to the high one.
    """
    pointer = x + row + token.to(tl.int64)[:, None] * x_n + channel[None, :]
    both = tl.load(pointer, mask=inside[:, None] & (channel < WIDTH // 2)[None, :], other=0)
    middle: tl.constexpr = 120.5 if STEP == 16 else 7.5
    return (both & 15).to(tl.float32) * STEP - middle, (both >> 4).to(tl.float32) * STEP - middle


@triton.jit
def logits_kernel(
    query, key, low, key_scale, valid, heads, again, logits, top, total, n_heads, length, scale, split_length,
    key_b, key_g, key_n, scale_b, scale_g, scale_n, valid_b, valid_g, valid_n,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    PLANES: tl.constexpr, AGAIN: tl.constexpr, HAS_VALID: tl.constexpr, HAS_HEADS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Write `logits [B, H, L]` of one split, and of capped ones `top, total [B, H, splits]`.

    `PLANES`: 0 none, 1 high, 2 both.
    """
    split, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    member, channel = tl.arange(0, ROWS), tl.arange(0, HALF)
    base = batch * n_heads + group * GROUP
    kept = kept_rows(heads, again, base, member, GROUP, HAS_HEADS, AGAIN)
    if tl.max(kept.to(tl.int32), axis=0) == 0:
        return
    half: tl.constexpr = (WIDTH + 1) // 2
    pointer = query + (base + member)[:, None] * WIDTH + channel[None, :]
    first = tl.load(pointer, mask=kept[:, None] & (channel < half)[None, :], other=0.0)
    second = tl.load(pointer + half, mask=kept[:, None] & (channel < WIDTH - half)[None, :], other=0.0)
    start_of_key, start_of_scale = batch * key_b + group * key_g, batch * scale_b + group * scale_g
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    end = tl.minimum((split + 1) * split_length, length)
    for start in range(split * split_length, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = existing(valid, batch, group, token, end, valid_b, valid_g, valid_n, HAS_VALID)
        if AGAIN:
            a, b = load_plane(low, start_of_key, token, inside, channel, key_n, WIDTH, 1)
        elif PLANES > 0:
            a, b = load_plane(key, start_of_key, token, inside, channel, key_n, WIDTH, 16)
        else:
            a, b = load_halves(key, start_of_key, token, inside, channel, key_n, WIDTH)
        if PLANES == 2:
            c, d = load_plane(low, start_of_key, token, inside, channel, key_n, WIDTH, 1)
            a, b = a + c, b + d
        logit = product(first, tl.trans(a.to(first.dtype)), tl.zeros([ROWS, BLOCK], tl.float32))
        logit = product(second, tl.trans(b.to(first.dtype)), logit) * scale
        if PLANES > 0:
            place = start_of_scale + token.to(tl.int64) * scale_n
            logit *= tl.load(key_scale + place, mask=inside, other=0.0)[None, :]
        place = (base + member)[:, None] * length + token[None, :]
        if AGAIN:
            logit += tl.load(logits + place, mask=kept[:, None] & inside[None, :], other=0.0)
        logit += logit * 0.0  # NaN where it is not finite: a cap or the softmax might hide that.
        logit = tl.where(inside[None, :], logit, float("-inf"))
        tl.store(logits + place, logit, mask=kept[:, None] & (token < end)[None, :])
        if CAP is not None:
            logit = tl.where(inside[None, :], capped(logit, CAP), float("-inf"))
        higher = tl.maximum(highest, tl.max(logit, axis=1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weight = weight * tl.exp(highest - anchor) + tl.sum(tl.exp(logit - anchor[:, None]), axis=1)
        highest = higher
    place = (base + member) * tl.num_programs(0) + split
    tl.store(top + place, highest, mask=kept)
    tl.store(total + place, weight, mask=kept)


@triton.jit
def settle_kernel(
    top, total, logits, heads, flat, anchor, norm, image, cut, counts, n_values, length, threshold, n_splits,
    HAS_HEADS: tl.constexpr, DECIDE: tl.constexpr, SELECT: tl.constexpr, HAS_COUNTS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one head: `anchor, norm [B, H]` of its softmax, whether it is `flat`, and which values it reads.

    Those are the ones whose logits have an image above `image`, and up to index `cut` the ones equal to it.
    """
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    pruned = False
    if HAS_HEADS:
        pruned = tl.load(heads + row) == 0
    if pruned:
        return
    split = tl.arange(0, SPLITS)
    highest = tl.load(top + row * n_splits + split, mask=split < n_splits, other=float("-inf"))
    weight = tl.load(total + row * n_splits + split, mask=split < n_splits, other=0.0)
    peak = tl.max(highest, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.sum(weight * tl.exp(highest - peak), axis=0)
    tl.store(anchor + row, peak)
    tl.store(norm + row, weight)
    if DECIDE:
        tl.store(flat + row, ((weight > 0.0) & (threshold * weight > 1.0)).to(tl.int8))
    if SELECT:
        wanted = n_values
        if HAS_COUNTS:
            wanted = tl.load(counts + tl.program_id(1)).to(tl.int32)
        least, missing = search(logits, logits, row, tl.minimum(wanted, length), length, length, 1, False, BLOCK)
        last = tl.full([], -1, tl.int32)
        before = tl.zeros([], tl.int32)
        for start in range(0, length, BLOCK):
            token = start + tl.arange(0, BLOCK)
            value = tl.load(logits + row * length + token, mask=token < length, other=0.0)
            equal = ((token < length) & (image_of(value) == least)).to(tl.int32)
            wanted_too = (equal > 0) & (tl.cumsum(equal, axis=0) + before <= missing)
            last = tl.maximum(last, tl.max(tl.where(wanted_too, token, -1), axis=0))
            before += tl.sum(equal, axis=0)
        tl.store(image + row, least.to(tl.int32, bitcast=True))
        tl.store(cut + row, last)
