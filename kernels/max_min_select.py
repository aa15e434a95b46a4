"""Greedy max-min choice of diverse tokens on the GPU; `tokenprune.ops.max_min_select` is the door and states the rule.

Two schemes, both without a synchronisation with the host:

- The similarity fits in the memory allowed: `_similarity_kernel` writes it, then `_greedy_kernel` runs the whole loop
  in one launch, one program per row. A step needs one row of the similarity (11 KiB at 2,880 tokens, from the L2 cache)
  and the running minimum never leaves the registers: a step costs one load and one reduction.
- It does not fit: the same kernel only finds the nearest neighbours, and `_step_kernel` is launched once per choice.
  Many programs share a row, since one cannot stream all features from memory fast enough. A launch per choice keeps
  them in step; a barrier inside one launch would hang wherever not all programs are resident at once.

Both schemes compute cosines in the same way, so that equal tokens tie bit for bit; `cosine` says how.
"""

import torch
import triton
import triton.language as tl
from tokenprune.kernels.common import EXACT, taking_part
from tokenprune.kernels.cosine import cosines, inverse_lengths, tile_shape

_SAME = 2.0**-20  # A cosine distance below this is fp32 noise and counts as 0, so that equal tokens tie.


@triton.jit
def _distance(similarity):
    """Cosine distance, 0 below 2^-20 = `_SAME`."""
    distance = 1.0 - similarity
    return tl.where(distance < 9.5367431640625e-07, 0.0, distance)


@triton.jit
def _similarity_kernel(
    x, inverse, valid, similarity, near, n_tokens, width, stride_b, stride_n, stride_d,
    HAS_VALID: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of the upper triangle: `similarity [B, N, N]`, and `near [B, tiles, N]`, a token's best match in a tile.

    The lower triangle mirrors the upper one: in fp32 the arithmetic bounds the time, and this halves it. Best matches
    are kept by tile and not combined with atomics: nothing has to be initialised, and they are read just once.
    """
    i, j, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j < i:
        return
    n_tiles = tl.num_programs(0)
    left, right = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    base = row * n_tokens
    cosine = cosines(
        x + row * stride_b, inverse + base, left, right, n_tokens, width, stride_n, stride_d, BLOCK, BLOCK, BLOCK_D
    )

    left_inside, right_inside = left < n_tokens, right < n_tokens
    if STORE:
        place = (base + left).to(tl.int64)[:, None] * n_tokens + right[None, :]
        tl.store(similarity + place, cosine, mask=left_inside[:, None] & right_inside[None, :])
        if i != j:
            place = (base + right).to(tl.int64)[:, None] * n_tokens + left[None, :]
            tl.store(similarity + place, tl.trans(cosine), mask=right_inside[:, None] & left_inside[None, :])

    other = left[:, None] != right[None, :]
    left_usable = taking_part(valid, base + left, left_inside, HAS_VALID)
    right_usable = taking_part(valid, base + right, right_inside, HAS_VALID)
    best = tl.max(tl.where(other & right_usable[None, :], cosine, float("-inf")), axis=1)
    tl.store(near + (row * n_tiles + j) * n_tokens + left, best, mask=left_inside)
    if i != j:
        best = tl.max(tl.where(left_usable[:, None], cosine, float("-inf")), axis=0)
        tl.store(near + (row * n_tiles + i) * n_tokens + right, best, mask=right_inside)


@triton.jit
def _greedy_kernel(similarity, first, order, path, n_tokens, k, BLOCK: tl.constexpr):
    """The greedy loop of one row; `gap`, the distance to the chosen set, stays in registers, `-1` for the chosen."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    gap = tl.load(first + row * n_tokens + token, mask=token < n_tokens, other=-1.0)
    best, chosen = tl.max(gap, axis=0, return_indices=True, return_indices_tie_break_left=True)
    gap = tl.where(gap < 0.0, -1.0, float("inf"))
    for step in range(k):
        tl.store(order + row * k + step, tl.where(best < 0.0, -1, chosen).to(tl.int64))
        line = tl.load(similarity + (row * n_tokens + chosen) * n_tokens + token, mask=token < n_tokens, other=0.0)
        gap = tl.where(token == chosen, -1.0, tl.minimum(gap, _distance(line)))
        best, chosen = tl.max(gap, axis=0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(path + row * k + step, tl.maximum(best, 0.0))


@triton.jit(do_not_specialize=["step"])
def _step_kernel(
    x, inverse, gap, best, where, order, path, n_tokens, width, stride_b, stride_n, stride_d, k, step,
    TILES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Choice number `step`: read the tiles' best candidates, update one tile of `gap [B, N]`, write its best.

    Candidates are read from one half of `best` and written to the other, since programs of a launch run in any order.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_tiles = tl.num_programs(0)
    tiles = tl.arange(0, TILES)
    half = (row * 2 + step % 2) * n_tiles
    values = tl.load(best + half + tiles, mask=tiles < n_tiles, other=-2.0)
    value, winner = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    chosen = tl.load(where + half + winner)
    if tile == 0:
        tl.store(order + row * k + step, tl.where(value < 0.0, -1, chosen).to(tl.int64))
        tl.store(path + row * k + step - 1, tl.maximum(value, 0.0), mask=step > 0)

    token = tile * BLOCK + tl.arange(0, BLOCK)
    inside, base = token < n_tokens, row * n_tokens
    # Sixteen equal columns: the narrowest product, and the same order of additions as in the similarity kernel.
    right = tl.zeros([16], tl.int32) + chosen
    cosine = cosines(
        x + row * stride_b, inverse + base, token, right, n_tokens, width, stride_n, stride_d, BLOCK, 16, BLOCK_D
    )
    before = tl.load(gap + base + token, mask=inside, other=-1.0)
    after = tl.where(token == chosen, -1.0, tl.minimum(before, _distance(tl.max(cosine, axis=1))))
    tl.store(gap + base + token, after, mask=inside)
    value, index = tl.max(after, axis=0, return_indices=True, return_indices_tie_break_left=True)
    half = (row * 2 + (step + 1) % 2) * n_tiles
    tl.store(best + half + tile, value)
    tl.store(where + half + tile, tile * BLOCK + index)


def launch(
    features: torch.Tensor, valid: torch.Tensor | None, k: int, *, memory: int, hold: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose up to `k` tokens per row.

    Args:
        features: `[B, N, D]`, any float dtype, any strides.
        valid: `[B, N]` bool, or `None` for all tokens.
        k: choices per row, `1 <= k <= N`.
        memory: bytes of extra memory allowed; the features' own bytes where that is more.
        hold: whether the similarity is held; by default wherever the memory allows it.

    Returns:
        `order [B, k]` int64, `-1` once all valid tokens are chosen, and the covering radius `[B, k]` fp32 after each.
    """
    if features.element_size() == 1:
        features = features.to(torch.bfloat16)  # Exact; not every GPU multiplies 8-bit floats.
    n_rows, n_tokens, _ = features.shape
    order = torch.empty(n_rows, k, dtype=torch.int64, device=features.device)
    path = torch.empty(n_rows, k, dtype=torch.float32, device=features.device)
    if valid is not None:
        valid = valid.contiguous()
    tiles = triton.cdiv(n_tokens, tile_shape(features)[0])
    row_bytes, small = features[:1].numel() * features.element_size(), 4 * n_tokens * (tiles + 2)
    if hold is None:
        hold = small + 4 * n_tokens**2 <= max(memory, row_bytes) and n_tokens <= 16384  # `_greedy_kernel`'s registers.
    per_row = small + (4 * n_tokens**2 if hold else 0)
    step = max(1, max(memory, n_rows * row_bytes) // per_row)
    with torch.cuda.device_of(features):
        for i in range(0, n_rows, step):
            part = slice(i, i + step)
            some = None if valid is None else valid[part]
            _launch_rows(features[part], some, k, order[part], path[part], hold)
    return order, path


def _launch_rows(
    x: torch.Tensor, valid: torch.Tensor | None, k: int, order: torch.Tensor, path: torch.Tensor, hold: bool
) -> None:
    """Fill `order` and `path [B, k]` for rows that fit into the memory together."""
    n_rows, n_tokens, width = x.shape
    block, block_d, warps = tile_shape(x)
    tiles = triton.cdiv(n_tokens, block)
    inverse = inverse_lengths(x)
    near = torch.empty(n_rows, tiles, n_tokens, dtype=torch.float32, device=x.device)
    similarity = near.new_empty(n_rows, n_tokens, n_tokens) if hold else near
    _similarity_kernel[(tiles, tiles, n_rows)](
        x, inverse, x if valid is None else valid, similarity, near, n_tokens, width, *x.stride(),
        HAS_VALID=valid is not None, STORE=hold, BLOCK=block, BLOCK_D=block_d, num_warps=warps, **EXACT,
    )  # fmt: skip
    # Distances of tokens to their nearest other one, infinite if there is none; -1 for those that take no part.
    first = 1 - near.amax(1)
    first.masked_fill_(first < _SAME, 0.0)
    if valid is not None:
        first.masked_fill_(~valid, -1.0)
    if hold:
        whole = triton.next_power_of_2(n_tokens)
        _greedy_kernel[(n_rows,)](
            similarity, first, order, path, n_tokens, k,
            BLOCK=whole, num_warps=min(max(whole // 256, 1), 16), **EXACT,
        )  # fmt: skip
        return
    gap, best = torch.full_like(first, torch.inf).masked_fill_(first < 0, -1.0), near.new_empty(n_rows, 2, tiles)
    where = torch.empty(n_rows, 2, tiles, dtype=torch.int32, device=x.device)
    padded = torch.nn.functional.pad(first, (0, tiles * block - n_tokens), value=-1.0)
    best[:, 0], index = padded.view(n_rows, tiles, block).max(2)
    where[:, 0] = index + torch.arange(0, tiles * block, block, dtype=torch.int64, device=x.device)
    for step in range(k):
        _step_kernel[(tiles, n_rows)](
            x, inverse, gap, best, where, order, path, n_tokens, width, *x.stride(), k, step,
            TILES=triton.next_power_of_2(tiles), BLOCK=block, BLOCK_D=block_d, **EXACT,
        )  # fmt: skip
    path[:, -1] = best[:, k % 2].amax(1).clamp_min(0.0)
