"""Keys and values in eight bits, as two planes of four (progressive quantization, SpAtten, arXiv 2012.09852, III-D).

A vector is quantized by itself: `scale` is its largest magnitude over 127, and its entries become the nearest integers
`q` of `x / scale`, halves to even, from -127 to 127. `q + 128` is split into two nibbles, `16 * high + low`. So

    both planes:      x ~ scale * (16 * high + low - 128)        off by half a scale at most
    high plane alone: x ~ scale * (16 * high + 7.5 - 128)        off by eight scales at most; the middle of 16 integers

and the low plane adds `scale * (low - 7.5)` to what the high plane gave, which is how it is read later, if at all. All
these multipliers are exact in bf16 and in fp16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import InputError


@dataclass(frozen=True)
class Planes:
    """Vectors `[..., K]` in eight bits.

    Attributes:
        high: `[..., K / 2]` uint8, the upper halves: byte `i` holds channel `i` in its lower nibble and channel
            `i + K / 2` in its upper one.
        low: `[..., K / 2]` uint8, the lower halves likewise.
        scale: `[...]` fp32.
    """

    high: Tensor
    low: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the vectors, `[..., K]`."""
        return torch.Size([*self.scale.shape, 2 * self.high.shape[-1]])

    @property
    def nbytes(self) -> int:
        """Bytes of all three tensors."""
        return self.high.nbytes + self.low.nbytes + self.scale.nbytes

    def each(self, change: Callable[[Tensor], Tensor]) -> "Planes":
        """Planes whose tensors are changed alike, along axes that all of them have: all but the last one of `high`."""
        return Planes(change(self.high), change(self.low), change(self.scale))


@torch.no_grad()
def quantize_planes(x: Tensor) -> Planes:
    """Quantize vectors to two planes; the module says how.

    A vector that is zero comes back as zero, and one with a NaN or an infinity as a vector that is not finite.

    Args:
        x: `[..., K]`, any float dtype, K even.

    Raises:
        InputError: a shape or dtype is wrong.
    """
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise InputError(
            "quantize_planes packs pairs of channels and needs vectors [..., K] of a float dtype with an even K; "
            f"got {x.dtype} {list(x.shape)}."
        )
    wide = x.float()
    scale = wide.abs().amax(-1) / 127
    offset = (wide / scale.unsqueeze(-1)).nan_to_num(0.0).round().clamp(-127, 127).add(128).to(torch.uint8)
    first, second = offset.chunk(2, dim=-1)
    return Planes((first >> 4) | (second & 0xF0), (first & 0xF) | (second << 4), scale)


@torch.no_grad()
def dequantize_planes(planes: Planes, *, low: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """The vectors `[..., K]` that planes represent, computed in fp32 and rounded once to `dtype`.

    Args:
        planes: what to read.
        low: whether the low plane is read too.
        dtype: of the result.
    """
    offset = 16.0 * _unpack(planes.high).float()
    offset = offset + _unpack(planes.low) - 128 if low else offset + (7.5 - 128)
    return (offset * planes.scale.unsqueeze(-1)).to(dtype)


def _unpack(plane: Tensor) -> Tensor:
    return torch.cat([plane & 0xF, plane >> 4], dim=-1)
