"""Weighted means of groups of tokens on the GPU; `tokenprune.ops.merge_tokens` is the door and states the rule.

Two launches and no atomics: `_order_kernel` lines the tokens up by group (a token's place is the number of those that
belong before it, so the order within a group is that of the tokens), and `_mean_kernel` gathers each group's tokens in
that order. Sums are therefore the same, bit for bit, in every run and in the torch version on a CPU.
"""

import torch
import triton
import triton.language as tl
from tokenprune.kernels.common import EXACT


@triton.jit
def _order_kernel(assign, order, start, count, n_tokens, n_groups, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr):
    """`order [B, N]`, the tokens by group; `start` and `count` `[B, M]`, where in it each group is."""
    row = tl.program_id(1).to(tl.int64)
    line = assign + row * n_tokens
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < n_tokens
    group = tl.load(line + token, mask=inside, other=0).to(tl.int32)
    lower, equal, earlier = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_tokens, BLOCK_J):
        other = first + tl.arange(0, BLOCK_J)
        theirs = tl.load(line + other, mask=other < n_tokens, other=2147483647).to(tl.int32)
        same = theirs[None, :] == group[:, None]
        lower += tl.sum((theirs[None, :] < group[:, None]).to(tl.int32), axis=1)
        equal += tl.sum(same.to(tl.int32), axis=1)
        earlier += tl.sum((same & (other[None, :] < token[:, None])).to(tl.int32), axis=1)
    tl.store(order + row * n_tokens + lower + earlier, token, mask=inside)
    leads = inside & (earlier == 0) & (group >= 0) & (group < n_groups)
    tl.store(start + row * n_groups + group, lower, mask=leads)
    tl.store(count + row * n_groups + group, equal, mask=leads)


@triton.jit
def _weight_of(weight, token, mask, HAS_WEIGHT: tl.constexpr):
    """What tokens count, 0 where the mask is False."""
    return tl.load(weight + token, mask=mask, other=0.0) if HAS_WEIGHT else tl.where(mask, 1.0, 0.0)


@triton.jit
def _mean_kernel(
    x, weight, order, start, count, out, size, n_tokens, n_groups, width, stride_b, stride_n, stride_d,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`out [B, M, D]`, the mean of each group, and `size [B, M]`, its weight."""
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = group < n_groups
    first = tl.load(start + row * n_groups + group, mask=inside, other=0)
    number = tl.load(count + row * n_groups + group, mask=inside, other=0)
    order += row * n_tokens
    if HAS_WEIGHT:
        weight += row * n_tokens
    most = tl.max(number, axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(most):
        mask = i < number
        total += _weight_of(weight, tl.load(order + first + i, mask=mask, other=0), mask, HAS_WEIGHT)

    pointer = x + row * stride_b + channel.to(tl.int64)[None, :] * stride_d
    kind = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    mean = tl.zeros([BLOCK, BLOCK_D], kind)
    for i in range(most):
        mask = i < number
        token = tl.load(order + first + i, mask=mask, other=0)
        share = tl.math.div_rn(_weight_of(weight, token, mask, HAS_WEIGHT), tl.where(mask, total, 1.0))
        place = pointer + token.to(tl.int64)[:, None] * stride_n
        value = tl.load(place, mask=mask[:, None] & (channel < width)[None, :], other=0.0).to(kind)
        value *= share.to(kind)[:, None]
        mean = tl.where(mask[:, None], tl.where(i == 0, value, mean + value), mean)
    place = (row * n_groups + group)[:, None] * width + channel[None, :]
    tl.store(out + place, mean.to(out.dtype.element_ty), mask=inside[:, None] & (channel < width)[None, :])
    if tl.program_id(2) == 0:
        tl.store(size + row * n_groups + group, total, mask=inside)


def launch(
    x: torch.Tensor, assign: torch.Tensor, n_out: int, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of every group.

    Args:
        x: `[B, N, D]`, any float dtype, any strides.
        assign: `[B, N]` int64, the group of each token.
        n_out: groups per row, M. One that is empty has mean and size 0.
        weight: `[B, N]`, what a token counts, or `None` where all count 1.

    Returns:
        Means `[B, M, D]` in the dtype of `x`, and `[B, M]` fp32, what the tokens of each group weigh together.
    """
    n_rows, n_tokens, width = x.shape
    assign = assign.contiguous()
    weights = x if weight is None else weight.float().contiguous()
    order = torch.empty(n_rows, n_tokens, dtype=torch.int32, device=x.device)
    start, count = torch.zeros(2, n_rows, n_out, dtype=torch.int32, device=x.device)
    out = torch.empty(n_rows, n_out, width, dtype=x.dtype, device=x.device)
    size = torch.empty(n_rows, n_out, dtype=torch.float32, device=x.device)
    block_d = min(256, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        _order_kernel[(triton.cdiv(n_tokens, 64), n_rows)](
            assign, order, start, count, n_tokens, n_out, BLOCK=64, BLOCK_J=64
        )
        _mean_kernel[(triton.cdiv(n_out, 8), n_rows, triton.cdiv(width, block_d))](
            x, weights, order, start, count, out, size, n_tokens, n_out, width, *x.stride(),
            HAS_WEIGHT=weight is not None, BLOCK=8, BLOCK_D=block_d, **EXACT,
        )  # fmt: skip
    return out, size
