"""A reduction says which tokens go on; it is data, and the one place that gathers tokens.

The same object shortens hidden states, positions, masks and every other per-token tensor of a forward, so that nothing
falls out of step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import InputError


def gather(x: Tensor, index: Tensor, *, dim: int = 1) -> Tensor:
    """Take tokens out of `x` along `dim`, other ones for each row of the batch.

    Args:
        x: tensor whose dimension `dim` counts tokens and whose dimension `dim - 1` is the batch: `[..., B, N, ...]`. A
            batch dimension of size 1 is broadcast to the rows of `index`.
        index: `[B, M]` int64, positions along `dim`.
        dim: dimension that counts tokens, at least 1.

    Returns:
        Tensor of the shape of `x` with B rows and M tokens.
    """
    index = index.to(x.device)
    if dim == 1:  # rows of memory at a time: several times faster than an index for every element
        first = torch.arange(index.shape[0], device=x.device)[:, None] * (x.shape[1] if x.shape[0] > 1 else 0)
        return x.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, *x.shape[2:])
    shape = list(x.shape)
    shape[dim - 1] = index.shape[0]
    x = x.expand(shape)
    view = [1] * x.ndim
    view[dim - 1], view[dim] = index.shape
    shape[dim] = index.shape[1]
    return x.gather(dim, index.view(view).expand(shape))


@dataclass(frozen=True)
class Keep:
    """Keep some tokens of every row, drop the others.

    Attributes:
        index: `[B, M]` int64, positions of the kept tokens, ascending in each row.
        valid: `[B, M]` bool where rows keep different numbers of tokens: False marks a slot that only fills a short row
            up. None where all slots count.
        radius: `[B]` fp32, largest cosine distance from a dropped token of the row to its nearest kept one, where the
            method knows it.
    """

    index: Tensor
    valid: Tensor | None = None
    radius: Tensor | None = None

    def apply(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Shorten `x` of `[..., B, N, ...]` along `dim` to the M kept tokens."""
        return gather(x, self.index, dim=dim)

    def restore(self, y: Tensor, *, length: int) -> Tensor:
        """Give `y` of `[B, M, ...]` its unpruned length back: `[B, length, ...]`.

        A dropped position carries the value of the nearest earlier kept one, or of the first kept one where none is
        earlier.
        """
        return gather(y, self.source(length=length))

    def source(self, *, length: int) -> Tensor:
        """For each of `length` unpruned positions the slot that it is restored from, `[B, length]` int64."""
        slots = torch.arange(self.index.shape[1], device=self.index.device).expand_as(self.index)
        first = torch.zeros_like(slots[:, :1])
        if self.valid is not None:  # a slot that only fills up is no source
            first = self.valid.to(torch.uint8).argmax(dim=1, keepdim=True)
            slots = torch.where(self.valid, slots, first)
        source = first.repeat(1, length).scatter_(1, self.index, slots)
        return source.cummax(dim=1).values

    def then(self, other: "Keep") -> "Keep":
        """The reduction that does this one first and `other` (positions among the kept tokens) after it.

        Raises:
            InputError: `other` does not fit the rows of this one.
        """
        if other.index.shape[0] != self.index.shape[0]:
            raise InputError(
                f"a reduction of {other.index.shape[0]} rows cannot follow one of {self.index.shape[0]} rows; give "
                f"both the same rows"
            )
        valid = self.valid
        if valid is not None:
            valid = gather(valid, other.index)
            valid = valid if other.valid is None else valid & other.valid
        else:
            valid = other.valid
        return Keep(gather(self.index, other.index), valid, other.radius)


def pack(kept: list[Tensor], *, length: int) -> Keep:
    """Pack rows that keep different positions into one `Keep` whose width is that of the longest row.

    A short row is filled up with positions that it dropped, marked invalid and left at their place, so that the order
    of the sequence stands. Where all rows keep all positions, the result is the identity.

    Args:
        kept: for each row `[m]` int64 positions, ascending, all on one device.
        length: unpruned length L of the rows.

    Returns:
        `Keep` with `index` `[B, M]` and `valid` `[B, M]`, M the largest m (at least 1).
    """
    width = max(1, *(len(row) for row in kept))
    mask = torch.zeros(len(kept), length, dtype=torch.bool, device=kept[0].device)
    for mask_row, row in zip(mask, kept, strict=True):
        mask_row[row] = True
    # Kept positions first, then dropped ones from the right; the first `width` of that order, back in ascending order.
    order = mask.flip(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    index = (length - 1 - order).sort(dim=1).values
    return Keep(index, mask.gather(1, index))
