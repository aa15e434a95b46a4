"""The k largest entries of a row on the GPU, in ascending order; `tokenprune.ops.top_k_select` states the rule.

One launch, one program per row. An fp32 number is read as an unsigned integer of the same order, and the k-th largest
one is found digit by digit, eight bits at a time: a histogram of the digit over the entries that agree with what is
known of it so far, and a sum over its bins from above. A last pass writes down where the larger entries stand, and as
many of the equal ones, the first, as are still wanted; a prefix sum over both gives every entry its place, so that the
order is kept and nothing is sorted. A row is read five times, from the caches of the processor that works on it after
the first. The histogram is counted by votes of a warp, so that scores which share their leading bits cost no more.
"""

import torch
import triton
import triton.language as tl
from tokenprune.kernels.common import taking_part


@triton.jit
def image_of(value):
    """fp32 numbers as unsigned integers of the same order; a NaN becomes the least of them."""
    value = tl.where(value == 0.0, 0.0, value)  # The negative zero too.
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value == value, bits.to(tl.uint32, bitcast=True) ^ 0x80000000, 0).to(tl.uint32)


@triton.jit
def load_image(scores, valid, row, token, n_tokens, stride_b, stride_n, HAS_VALID: tl.constexpr):
    """Images of some entries of a row, and which of them exist and take part."""
    inside = token < n_tokens
    value = tl.load(scores + row * stride_b + token.to(tl.int64) * stride_n, mask=inside, other=0.0).to(tl.float32)
    return image_of(value), taking_part(valid, row * n_tokens + token, inside, HAS_VALID)


@triton.jit
def search(scores, valid, row, wanted, n_tokens, stride_b, stride_n, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr):
    """Image of the last entry of a row that is wanted, and how many of the entries equal to it are."""
    threshold = tl.zeros([], tl.uint32)  # Its leading digits.
    missing = wanted + tl.zeros([], tl.int32)  # How many of the entries that share them are wanted.
    for digit in range(4):
        shift = (24 - 8 * digit + tl.zeros([], tl.int32)).to(tl.uint32)
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, n_tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            image, inside = load_image(scores, valid, row, token, n_tokens, stride_b, stride_n, HAS_VALID)
            leading = image >> shift
            inside = inside & ((leading >> 8) == threshold)
            histogram += tl.histogram((leading & 255).to(tl.int32), 256, mask=inside)
        at_least = tl.cumsum(histogram, axis=0, reverse=True)
        found = tl.maximum(tl.sum((at_least >= missing).to(tl.int32), axis=0) - 1, 0)
        missing -= tl.max(tl.where(at_least < missing, at_least, 0), axis=0)
        threshold = (threshold << 8) | found.to(tl.uint32)
    return threshold, missing


@triton.jit
def _top_k_kernel(
    scores, valid, counts, index, n_tokens, width, stride_b, stride_n,
    HAS_VALID: tl.constexpr, HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write `index [B, width]` of one row: its largest entries in ascending order, then `-1`."""
    row = tl.program_id(0).to(tl.int64)
    wanted = width
    if HAS_COUNTS:
        wanted = tl.load(counts + row)
    threshold, missing = search(scores, valid, row, wanted, n_tokens, stride_b, stride_n, HAS_VALID, BLOCK)
    before = tl.zeros([], tl.int32)  # Larger entries before this block, and equal ones.
    equal_before = tl.zeros([], tl.int32)
    for start in range(0, n_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        image, inside = load_image(scores, valid, row, token, n_tokens, stride_b, stride_n, HAS_VALID)
        larger = inside & (image > threshold)
        equal = inside & (image == threshold)
        both = larger.to(tl.int32) + (equal.to(tl.int32) << 16)  # One prefix sum for two: a block holds at most 2^15.
        earlier = tl.cumsum(both, axis=0) - both
        equals = equal_before + (earlier >> 16)
        place = before + (earlier & 0xFFFF) + tl.minimum(equals, missing)
        taken = larger | (equal & (equals < missing))
        tl.store(index + row * width + place, token.to(tl.int64), mask=taken)
        total = tl.sum(both, axis=0)
        before += total & 0xFFFF
        equal_before += total >> 16
    if HAS_COUNTS:
        for start in range(0, width, BLOCK):
            place = start + tl.arange(0, BLOCK)
            blank = tl.full([BLOCK], -1, tl.int64)
            tl.store(index + row * width + place, blank, mask=(place >= wanted) & (place < width))


def launch(
    scores: torch.Tensor, valid: torch.Tensor | None, width: int, counts: list[int] | None = None
) -> torch.Tensor:
    """Choose the `width` largest entries per row, or `counts` of them, at most `width`.

    Args:
        scores: `[B, N]`, any float dtype, any strides.
        valid: `[B, N]` bool, or `None` for all entries; a row has as many as are wanted of it.
        width: entries per row, `0 <= width <= N`.
        counts: entries per row where they differ.

    Returns:
        `index [B, width]` int64, ascending, `-1` from a row's count on.
    """
    n_rows, n_tokens = scores.shape
    index = torch.empty(n_rows, width, dtype=torch.int64, device=scores.device)
    if index.numel() == 0:
        return index
    mask = scores if valid is None else valid.contiguous()
    wanted = index
    if counts is not None:
        wanted = torch.tensor(counts, dtype=torch.int32, device="cpu").to(scores.device, non_blocking=True)
    block = min(max(triton.next_power_of_2(n_tokens), 256), 8192)
    with torch.cuda.device_of(scores):
        _top_k_kernel[(n_rows,)](
            scores, mask, wanted, index, n_tokens, width, *scores.stride(),
            HAS_VALID=valid is not None, HAS_COUNTS=counts is not None, BLOCK=block,
            num_warps=min(max(block // 256, 2), 16), enable_fp_fusion=True,
        )  # fmt: skip
    return index
