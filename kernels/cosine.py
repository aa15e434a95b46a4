"""Cosines of tokens on the GPU.

A cosine is to depend on its two vectors, not on where they stand, so that equal tokens tie bit for bit and padding
changes nothing. Hence all tiles accumulate over the channels in the same order and scale by a product that commutes,
and the compiler may not fuse that scaling with what follows (`EXACT`; dot products are not affected).
"""

import torch
import triton
import triton.language as tl
from tokenprune.kernels.common import EXACT, operand


@triton.jit
def _inverse_length_kernel(
    x, inverse, n_tokens, width, stride_b, stride_n, stride_d, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write `inverse [B, N]`: 1 / max(length, 1e-12), and 0 for vectors that are not finite, whose cosines become 0."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_D)
    pointer = x + row * stride_b + token.to(tl.int64)[:, None] * stride_n + channel.to(tl.int64)[None, :] * stride_d
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_D):
        mask = (token < n_tokens)[:, None] & (channel < width - start)[None, :]
        value = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        total += value * value
        pointer += BLOCK_D * stride_d
    length = tl.sqrt(tl.sum(total, axis=1))
    finite = length < float("inf")  # False for a NaN too.
    result = tl.where(finite, 1.0 / tl.maximum(length, 1e-12), 0.0)
    tl.store(inverse + row * n_tokens + token, result, mask=token < n_tokens)


def inverse_lengths(x: torch.Tensor) -> torch.Tensor:
    """What the tokens `[B, N, D]` are multiplied with to become unit vectors, `[B, N]` fp32; 0 if one is not finite."""
    n_rows, n_tokens, width = x.shape
    inverse = torch.empty(n_rows, n_tokens, dtype=torch.float32, device=x.device)
    _inverse_length_kernel[(triton.cdiv(n_tokens, 16), n_rows)](
        x, inverse, n_tokens, width, *x.stride(), BLOCK=16, BLOCK_D=128, **EXACT
    )
    return inverse


@triton.jit
def cosines(
    x, inverse, left, right, n_tokens, width, stride_n, stride_d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines `[ROWS, COLUMNS]` in fp32 of the tokens `left` and `right` of the row at `x`; 0 of vectors not finite."""
    channel = tl.arange(0, BLOCK_D)
    offset = channel.to(tl.int64) * stride_d
    a_pointer = x + left.to(tl.int64)[:, None] * stride_n + offset[None, :]
    b_pointer = x + right.to(tl.int64)[None, :] * stride_n + offset[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, BLOCK_D):
        inside = channel < width - start
        a = tl.load(a_pointer, mask=(left < n_tokens)[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_pointer, mask=(right < n_tokens)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(operand(a), operand(b), total, input_precision="ieee")
        a_pointer += BLOCK_D * stride_d
        b_pointer += BLOCK_D * stride_d
    left_inverse = tl.load(inverse + left, mask=left < n_tokens, other=0.0)
    right_inverse = tl.load(inverse + right, mask=right < n_tokens, other=0.0)
    scale = left_inverse[:, None] * right_inverse[None, :]
    return tl.where(scale > 0.0, total * scale, 0.0)


def tile_shape(x: torch.Tensor) -> tuple[int, int, int]:
    """Tokens, channels and warps of a tile of cosines of all tokens with each other."""
    # fp32 products run on the plain cores and fill the registers sooner; the others run on the tensor cores.
    return (64, 32, 4) if x.element_size() > 2 else (128, 64, 8)
