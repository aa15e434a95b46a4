"""Bipartite matching of tokens on the GPU; `tokenprune.ops.bipartite_match` is the door and states the rule.

Four launches, no synchronisation with the host and nothing as large as the similarity:

- `cosine.inverse_lengths`: what makes the keys unit vectors.
- `_partner_kernel`: a tile of sources passes over all tiles of destinations and keeps the best one of each source.
- `_rank_kernel`, one program per row: a source merges if fewer than r others are ahead of it; how many merge before
  each source follows by a running sum.
- `_assign_kernel`: from that sum, the group of every token and the position of every group.

Equal destinations have to tie bit for bit; `cosine` says how.
"""

import torch
import triton
import triton.language as tl
from tokenprune.kernels.common import EXACT, taking_part
from tokenprune.kernels.cosine import cosines, inverse_lengths


@triton.jit
def _tokens_at(order, free, base, free_base, place, n_tokens, HAS_ORDER: tl.constexpr, HAS_FREE: tl.constexpr):
    """The tokens that stand at places of a row, and which of those places exist and take part."""
    inside = place < n_tokens
    token = place
    if HAS_ORDER:
        token = tl.load(order + base + place, mask=inside, other=0).to(tl.int32)
    return token, taking_part(free + free_base, token, inside, HAS_FREE)


@triton.jit
def _partner_kernel(
    keys, inverse, order, free, best, partner, n_tokens, width, stride_b, stride_n, stride_d, free_stride,
    HAS_ORDER: tl.constexpr, HAS_FREE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`best [B, S]`, the highest cosine of each source (`-inf` if it may not merge), and whose it is, `partner`."""
    row = tl.program_id(1).to(tl.int64)
    base, free_base = row * n_tokens, row * free_stride
    source = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left, left_inside = _tokens_at(order, free, base, free_base, source * 2, n_tokens, HAS_ORDER, HAS_FREE)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    whose = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_tokens // 2, BLOCK):
        place = (first + tl.arange(0, BLOCK)) * 2 + 1
        right, right_inside = _tokens_at(order, free, base, free_base, place, n_tokens, HAS_ORDER, HAS_FREE)
        cosine = cosines(
            keys + row * stride_b, inverse + base, left, right, n_tokens, width, stride_n, stride_d,
            BLOCK, BLOCK, BLOCK_D,
        )  # fmt: skip
        cosine = tl.minimum(cosine, 0.99999904632568359375)  # 1 - 2^-20: above it differences are fp32 noise.
        cosine = tl.where(right_inside[None, :], cosine, float("-inf"))
        value, index = tl.max(cosine, axis=1, return_indices=True, return_indices_tie_break_left=True)
        whose = tl.where(value > highest, first + index, whose)
        highest = tl.maximum(value, highest)

    n_sources = (n_tokens + 1) // 2
    out = row * n_sources + source
    tl.store(best + out, tl.where(left_inside, highest, float("-inf")), mask=source < n_sources)
    tl.store(partner + out, whose, mask=source < n_sources)


@triton.jit
def _rank_kernel(best, before, n_sources, r, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr):
    """`before [B, S + 1]`: how many sources of a row merge before each one, and in the end how many do."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.arange(0, BLOCK)
    inside = source < n_sources
    value = tl.load(best + row * n_sources + source, mask=inside, other=float("-inf"))
    ahead = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_sources, BLOCK_J):
        other = start + tl.arange(0, BLOCK_J)
        theirs = tl.load(best + row * n_sources + other, mask=other < n_sources, other=float("-inf"))
        first = (theirs[None, :] == value[:, None]) & (other[None, :] < source[:, None])
        ahead += tl.sum(((theirs[None, :] > value[:, None]) | first).to(tl.int32), axis=1)
    merges = (inside & (ahead < r)).to(tl.int32)
    line = before + row * (n_sources + 1)
    tl.store(line + 1 + source, tl.cumsum(merges, axis=0), mask=inside)
    tl.store(line, 0)


@triton.jit
def _assign_kernel(
    partner, before, order, valid, n_before, index, assign, n_tokens, n_sources, n_groups,
    HAS_ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`assign [B, N]`, the group of every token, and `index [B, M]`, the position of every group."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < n_tokens
    base, line = row * n_tokens, before + row * (n_sources + 1)
    place = token
    if HAS_ORDER:
        place = tl.load(n_before + base + token, mask=inside, other=0).to(tl.int32)
    is_source = taking_part(valid, base + token, inside, HAS_ORDER) & (place % 2 == 0)
    source = place // 2
    earlier = tl.load(line + source, mask=is_source, other=0)
    merges = is_source & (tl.load(line + source + 1, mask=is_source, other=0) > earlier)
    own = token - tl.load(line + (place + 1) // 2, mask=inside, other=0)

    destination = tl.load(partner + row * n_sources + source, mask=merges, other=0)
    target = destination * 2 + 1
    if HAS_ORDER:
        target = tl.load(order + base + target, mask=merges, other=0).to(tl.int32)
    target -= tl.load(line + destination + 1, mask=merges, other=0)
    tl.store(assign + base + token, tl.where(merges, target, own).to(tl.int64), mask=inside)
    tl.store(index + row * n_groups + own, token.to(tl.int64), mask=inside & ~merges)


def launch(
    keys: torch.Tensor, free: torch.Tensor | None, valid: torch.Tensor | None, r: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge `r` tokens per row.

    Args:
        keys: `[B, N, D]`, any float dtype, any strides.
        free: `[1 or B, N]` bool, tokens that may merge or be merged into, or `None` for all; all of them are valid.
        valid: `[B, N]` bool, tokens whose places are counted, or `None` for all.
        r: tokens to merge away per row, at most as many as its sources that may.

    Returns:
        `index [B, N - r]` and `assign [B, N]`, int64.
    """
    if keys.element_size() == 1:
        keys = keys.to(torch.bfloat16)  # Exact; not every GPU multiplies 8-bit floats.
    n_rows, n_tokens, width = keys.shape
    n_sources, device = (n_tokens + 1) // 2, keys.device
    order, n_before = keys, keys
    if valid is not None:
        order = (~valid).to(torch.uint8).sort(dim=1, stable=True).indices
        n_before = valid.cumsum(1) - valid.to(torch.int64)
        valid, free = valid.contiguous(), valid if free is None else free
    mask = keys if free is None else free.contiguous()
    best = torch.empty(n_rows, n_sources, dtype=torch.float32, device=device)
    partner = torch.empty(n_rows, n_sources, dtype=torch.int32, device=device)
    before = torch.empty(n_rows, n_sources + 1, dtype=torch.int32, device=device)
    index = torch.empty(n_rows, n_tokens - r, dtype=torch.int64, device=device)
    assign = torch.empty(n_rows, n_tokens, dtype=torch.int64, device=device)
    whole = triton.next_power_of_2(n_sources)
    ordered = valid is not None
    with torch.cuda.device_of(keys):
        _partner_kernel[(triton.cdiv(n_sources, 64), n_rows)](
            keys, inverse_lengths(keys), order, mask, best, partner, n_tokens, width, *keys.stride(),
            n_tokens if free is not None and len(free) > 1 else 0,
            HAS_ORDER=ordered, HAS_FREE=free is not None, BLOCK=64, BLOCK_D=32 if keys.element_size() > 2 else 64,
            **EXACT,
        )  # fmt: skip
        _rank_kernel[(n_rows,)](
            best, before, n_sources, r, BLOCK=whole, BLOCK_J=max(1, min(whole, 8192 // whole)),
            num_warps=min(max(whole // 32, 4), 16),
        )  # fmt: skip
        _assign_kernel[(triton.cdiv(n_tokens, 128), n_rows)](
            partner, before, order, keys if valid is None else valid, n_before, index, assign,
            n_tokens, n_sources, n_tokens - r, HAS_ORDER=ordered, BLOCK=128,
        )  # fmt: skip
    return index, assign
