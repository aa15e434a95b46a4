"""Attention that keys get, on the GPU; `tokenprune.ops.attention_importance` is the door and states the rule.

Two passes in the manner of flash attention, neither of which writes an attention matrix:

- `_log_sum_exp_kernel`, a program per block of queries, loops over the keys that the block sees.
- `_column_kernel`, a program per block of keys, loops over the queries that see it and adds up their probabilities,
  each times the query's weight. A column belongs to one program: no atomics, and the same sum in every run.

Column sums need the second pass once, with weights of one. The last query's row is the column sum of one query. A step
of the power iteration is the second pass with the scores before it as weights.

Logits are kept in units of log 2, so that exponentials are powers of 2. A query that takes no part has an infinite
log-sum-exp, which makes its probabilities 0 without a mask in the second pass. One that sees a product which is not
finite has a log-sum-exp of NaN (maxima pass over a NaN, sums do not), and so makes its probabilities NaN; which other
columns of a tile they reach does not matter, since the op then makes all scores of the row NaN.
"""

import math

import torch
import triton
import triton.language as tl
from tokenprune.kernels.common import operand, shared_memory, taking_part
from tokenprune.kernels.decode_logits import capped

WIDEST = 256  # Head width up to which `blocks_for` finds tiles that fit into shared memory.
STEPS = 5  # Of the power iteration.
_OFF, _BOOL, _FLOAT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # Kinds of `seen`.


@triton.jit
def _tile(x, token, inside, start, width, stride_n, stride_d, BLOCK_D: tl.constexpr):
    """`[tokens, BLOCK_D]` of one head from channel `start` on, 0 outside."""
    channel = start + tl.arange(0, BLOCK_D)
    pointer = x + token.to(tl.int64)[:, None] * stride_n + channel[None, :] * stride_d
    return operand(tl.load(pointer, mask=inside[:, None] & (channel < width)[None, :], other=0.0))


@triton.jit
def _logits(
    held, query, key, i, j, i_inside, j_inside, width,
    stride_qn, stride_qd, stride_kn, stride_kd, HELD_QUERIES: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products `[queries, keys]` in fp32; `held` is the tile of one side if `WHOLE` channels fit in one."""
    if WHOLE:
        if HELD_QUERIES:
            other = _tile(key, j, j_inside, 0, width, stride_kn, stride_kd, BLOCK_D)
            total = tl.dot(held, tl.trans(other), input_precision="ieee")
        else:
            other = _tile(query, i, i_inside, 0, width, stride_qn, stride_qd, BLOCK_D)
            total = tl.dot(other, tl.trans(held), input_precision="ieee")
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, width, BLOCK_D):
            a = _tile(query, i, i_inside, start, width, stride_qn, stride_qd, BLOCK_D)
            b = _tile(key, j, j_inside, start, width, stride_kn, stride_kd, BLOCK_D)
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    return total


@triton.jit
def _masked(
    logits, i, j, position, i_inside, j_inside, seen, stride_sq, stride_sk, scale, bias_scale, low, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEEN: tl.constexpr, CAP: tl.constexpr, TELL: tl.constexpr,
):  # fmt: skip
    """Logits in units of log 2, -inf where the query does not see the key; `TELL`: NaN for products not finite."""
    visible = i_inside[:, None] & j_inside[None, :]
    nothing = logits * 0.0  # NaN where the product is NaN or infinite.
    logits = logits * scale
    if CAP is not None:
        logits = capped(logits, CAP) * bias_scale
    if TELL:
        logits = logits + nothing
    if SEEN != _OFF:
        pointer = seen + i.to(tl.int64)[:, None] * stride_sq + j.to(tl.int64)[None, :] * stride_sk
        if SEEN == _BOOL:
            visible = visible & (tl.load(pointer, mask=visible, other=0) != 0)
        else:
            bias = tl.load(pointer, mask=visible, other=0.0).to(tl.float32)
            visible = visible & ~(bias <= low)  # A NaN hides nothing.
            logits = logits + bias * bias_scale
    else:
        if CAUSAL:
            visible = visible & (j[None, :] <= position[:, None])
        if WINDOW:
            visible = visible & (position[:, None] - j[None, :] < window)
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def _log_sum_exp_kernel(
    query, key, valid, seen, before, lse, n_queries, n_keys, width, n_heads, group,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_sb, stride_sq, stride_sk, scale, bias_scale, low, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEEN: tl.constexpr, HAS_VALID: tl.constexpr, CAP: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write `lse [B, H, Lq]`: log2 of the sum of powers of 2 over the keys that a query sees; +inf if it sees none."""
    head, row = (tl.program_id(1) % n_heads).to(tl.int64), (tl.program_id(1) // n_heads).to(tl.int64)
    query += row * stride_qb + head * stride_qh
    key += row * stride_kb + (head // group) * stride_kh
    seen += row * stride_sb
    first = tl.load(before + row)
    # The last queries of a causal head have the most to do and come first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    position = first + i
    i_inside = taking_part(valid, row * n_keys + position, (i < n_queries) & (position < n_keys), HAS_VALID)
    start, end = 0, n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, first + (block + 1) * BLOCK_M)
    if WINDOW:
        start = tl.maximum(0, first + block * BLOCK_M - window + 1) // BLOCK_N * BLOCK_N
    held = i
    if WHOLE:
        held = _tile(query, i, i_inside, 0, width, stride_qn, stride_qd, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for at in range(start, end, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        j_inside = taking_part(valid, row * n_keys + j, j < n_keys, HAS_VALID)
        logits = _logits(
            held, query, key, i, j, i_inside, j_inside, width, stride_qn, stride_qd, stride_kn, stride_kd,
            True, WHOLE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        logits = _masked(
            logits, i, j, position, i_inside, j_inside, seen, stride_sq, stride_sk, scale, bias_scale, low, window,
            CAUSAL, WINDOW, SEEN, CAP, True,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logits, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
        top = higher
    blind = total == 0.0
    result = tl.where(blind, float("inf"), top + tl.log2(tl.where(blind, 1.0, total)))
    tl.store(lse + tl.program_id(1).to(tl.int64) * n_queries + i, result, mask=i < n_queries)


@triton.jit
def _column_kernel(
    query, key, valid, seen, before, lse, weight, out, n_queries, n_keys, width, n_heads, group,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_sb, stride_sq, stride_sk, scale, bias_scale, low, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEEN: tl.constexpr, HAS_VALID: tl.constexpr, WEIGHTED: tl.constexpr,
    CAP: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write `out [B, H, Lk]`: probabilities summed over the queries, times `weight [B, H, Lq]` if `WEIGHTED`."""
    head, row = (tl.program_id(1) % n_heads).to(tl.int64), (tl.program_id(1) // n_heads).to(tl.int64)
    query += row * stride_qb + head * stride_qh
    key += row * stride_kb + (head // group) * stride_kh
    seen += row * stride_sb
    first = tl.load(before + row)
    base = tl.program_id(1).to(tl.int64) * n_queries
    block = tl.program_id(0)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    j_inside = taking_part(valid, row * n_keys + j, j < n_keys, HAS_VALID)
    start, end = 0, n_queries
    if CAUSAL:
        start = tl.maximum(0, block * BLOCK_N - first) // BLOCK_M * BLOCK_M
    if WINDOW:
        end = tl.minimum(n_queries, (block + 1) * BLOCK_N - 1 + window - first)
    held = j
    if WHOLE:
        held = _tile(key, j, j_inside, 0, width, stride_kn, stride_kd, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(start, end, BLOCK_M):
        i = at + tl.arange(0, BLOCK_M)
        i_inside = i < n_queries
        bound = tl.load(lse + base + i, mask=i_inside, other=float("inf"))
        i_inside = bound != float("inf")
        logits = _logits(
            held, query, key, i, j, i_inside, j_inside, width, stride_qn, stride_qd, stride_kn, stride_kd,
            False, WHOLE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        logits = _masked(
            logits, i, j, first + i, i_inside, j_inside, seen, stride_sq, stride_sk, scale, bias_scale, low, window,
            CAUSAL, WINDOW, SEEN, CAP, False,
        )  # fmt: skip
        probability = tl.exp2(logits - bound[:, None])
        if WEIGHTED:
            probability *= tl.load(weight + base + i, mask=i_inside, other=0.0)[:, None]
        total += probability
    place = tl.program_id(1).to(tl.int64) * n_keys + j
    tl.store(out + place, tl.where(j_inside, tl.sum(total, axis=0), 0.0), mask=j < n_keys)


def blocks_for(width: int, element_size: int, shared: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of both kernels.

    Args:
        width: of a head, at most `WIDEST`.
        element_size: bytes of a number.
        shared: bytes of shared memory that a program may have.
    """
    # fp32 products run on the plain cores and fill the registers, so channels come piece by piece. So do all products
    # before Ampere, whose least is 99 KiB.
    if element_size > 2 or shared < 99 << 10:
        both = {"WHOLE": False, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
        return both, both
    channels = max(16, triton.next_power_of_2(width))
    tile = {"WHOLE": True, "BLOCK_D": channels, "num_warps": 8, "num_stages": 3 if channels <= 128 else 2}
    held = 128 if 2 * channels * (128 + 64 * tile["num_stages"]) <= shared else 64
    return tile | {"BLOCK_M": held, "BLOCK_N": 64}, tile | {"BLOCK_M": 64, "BLOCK_N": held}


def launch(
    query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, seen: torch.Tensor | None, before: torch.Tensor,
    scale: float, temperature: float, causal: bool, window: int | None, softcap: float | None, *, pagerank: bool,
) -> torch.Tensor:  # fmt: skip
    """Score the keys.

    Args:
        query: `[B, H, Lq, K]`, consecutive positions, any float dtype, any strides; `K` is at most `WIDEST`.
        key: `[B, Hkv, Lk, K]`.
        valid: `[B, Lk]` bool, or `None` for all.
        seen: `[B, 1, Lq, Lk]`, bool or added to the logits, in place of `causal` and `window`, or `None`.
        before: `[B]` int64, the position of the first query.
        scale: factor of the logits.
        temperature: divides the logits.
        causal: whether a query sees only the keys up to its own position.
        window: the distance behind the query from which on keys are hidden, or `None`.
        softcap: c of logits that become c tanh(logits / c) before the temperature divides them, or `None`.
        pagerank: whether scores are those of page-rank, and not column sums.

    Returns:
        `[B, Lk]` fp32; of a row where a query that counts sees a product that is not finite, some are NaN.
    """
    if key.element_size() == 1:
        query, key = query.to(torch.bfloat16), key.to(torch.bfloat16)  # Exact; not every GPU multiplies 8-bit floats.
    (n_rows, n_heads, n_queries, width), n_keys = query.shape, key.shape[2]
    valid = None if valid is None else valid.contiguous()
    kind, low, strides = 0, 0.0, (0, 0, 0)
    if seen is not None:
        kind = 1 if seen.dtype == torch.bool else 2
        low = torch.finfo(seen.dtype).min / 2 if kind == 2 else 0.0
        strides = (seen.stride(0), seen.stride(2), seen.stride(3))
    lse = torch.empty(n_rows, n_heads, n_queries, dtype=torch.float32, device=key.device)
    mask, bias = key if valid is None else valid, key if seen is None else seen
    unit = math.log2(math.e) / temperature
    numbers = (
        n_queries, n_keys, width, n_heads, n_heads // key.shape[1], *query.stride(), *key.stride(), *strides,
        scale * unit if softcap is None else scale, unit, low, window or 0,
    )  # fmt: skip
    tensors = (query, key, mask, bias, before.to(torch.int32), lse)
    kinds = {
        "CAUSAL": causal and kind == 0, "WINDOW": window is not None and kind == 0, "SEEN": kind,
        "HAS_VALID": valid is not None, "CAP": softcap,
    }  # fmt: skip
    first, second = blocks_for(width, key.element_size(), shared_memory(key.device))

    def columns(weight: torch.Tensor | None) -> torch.Tensor:
        """Column sums `[B, H, Lk]`, of rows times `weight [B, H, Lq]` where it is given."""
        out = torch.empty(n_rows, n_heads, n_keys, dtype=torch.float32, device=key.device)
        _column_kernel[(triton.cdiv(n_keys, second["BLOCK_N"]), n_rows * n_heads)](
            *tensors, lse if weight is None else weight, out, *numbers, **kinds, WEIGHTED=weight is not None, **second
        )
        return out

    with torch.cuda.device_of(key):
        _log_sum_exp_kernel[(triton.cdiv(n_queries, first["BLOCK_M"]), n_rows * n_heads)](
            *tensors, *numbers, **kinds, **first
        )
        if not pagerank:
            return columns(None).sum(1)
        weight = key.new_ones(n_rows, n_keys, dtype=torch.float32) if valid is None else valid.to(torch.float32)
        weight = (weight / weight.sum(1, keepdim=True).clamp_min(1))[:, None].expand(-1, n_heads, -1).contiguous()
        for _ in range(STEPS):
            weight = columns(weight)
        return weight.square().mean(1).sqrt()
