"""Finding tokens that are equal bit for bit."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.errors import InputError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class EqualTokens(NamedTuple):
    """What `equal_tokens` found.

    Attributes:
        first: `[B, N]` int64, for each token the first one that equals it.
        middle: `[B, N]` int64, for each token the middle one of those that equal it (of two, the first).
    """

    first: Tensor
    middle: Tensor


@torch.no_grad()
def equal_tokens(x: Tensor) -> EqualTokens:
    """Which tokens of a row are equal bit for bit.

    Tokens are compared by their fingerprints: two different tokens meet in them once in about 10^19 pairs.

    Args:
        x: `[B, N, D]`, any float dtype, any strides.

    Returns:
        An `EqualTokens`, on the device of `x`.

    Raises:
        InputError: `x` is of another shape or dtype.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise InputError(f"equal_tokens needs x [B, N, D] of a float dtype; got {x.dtype} {list(x.shape)}.")
    order = fingerprint(x).sort(dim=1, stable=True)
    place = torch.arange(x.shape[1], dtype=torch.int64, device=x.device).expand_as(order.indices)
    starts = torch.ones_like(place, dtype=torch.bool)
    starts[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    group = starts.cumsum(1) - 1
    size = torch.zeros_like(place).scatter_add_(1, group, torch.ones_like(place)).gather(1, group)
    start = place.where(starts, 0).cummax(1).values
    first, middle = order.indices.gather(1, start), order.indices.gather(1, start + (size - 1) // 2)
    back = torch.empty_like(place)
    return EqualTokens(back.scatter(1, order.indices, first), torch.empty_like(place).scatter(1, order.indices, middle))


def fingerprint(x: Tensor) -> Tensor:
    """A sum of 64 bits over the bits of every token `[..., D]`, in integers, so that it does not depend on its order.

    Args:
        x: any float dtype, any strides.

    Returns:
        `[...]` int64, on the device of `x`.
    """
    bits = x.contiguous().view(_BITS[x.element_size()]).to(torch.int64)
    generator = torch.Generator(device="cpu").manual_seed(0)
    weight = torch.randint(-(2**63), 2**63 - 1, x.shape[-1:], generator=generator, dtype=torch.int64, device="cpu")
    return (bits * (weight | 1).to(x.device)).sum(-1)
