"""A reduction says which tokens are kept or merged; it is data, and the one place that gathers tokens.

The same object shortens hidden states, positions, masks and every other per-token tensor of a forward, so that nothing
falls out of step.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

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
        flat = index
        if index.shape[0] > 1 and x.shape[0] > 1:
            flat = index + torch.arange(index.shape[0], dtype=torch.int64, device=x.device)[:, None] * x.shape[1]
        return x.flatten(0, 1).index_select(0, flat.flatten()).view(*index.shape, *x.shape[2:])
    view = [1] * x.ndim
    view[dim - 1], view[dim] = index.shape
    return torch.take_along_dim(x, index.view(view), dim)


def add_at(out: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """`out` with `values` added at `index`, in that order: on a GPU `index_put_` sorts, `index_add_` races."""
    if out.device.type == "cpu":
        return out.index_add_(0, index, values)
    return out.index_put_((index,), values, accumulate=True)


@dataclass(frozen=True)
class Keep:
    """Keep some tokens of every row, drop the others.

    Attributes:
        index: `[B, M]` int64, positions of the kept tokens, ascending in each row.
        valid: `[B, M]` bool where rows keep different numbers of tokens: False marks a padding slot of a short row.
            None where all slots count.
        radius: `[B]` fp32, largest cosine distance from a dropped token of the row to its nearest kept one, where the
            method knows it.
    """

    index: Tensor
    valid: Tensor | None = None
    radius: Tensor | None = None

    def apply(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Shorten `x` of `[..., B, N, ...]` along `dim` to the M kept tokens."""
        return gather(x, self.index, dim=dim)

    def to(self, device: torch.device) -> "Keep":
        """The same with `index` and `valid` on `device`."""
        return replace(self, index=self.index.to(device), valid=None if self.valid is None else self.valid.to(device))

    def restore(self, y: Tensor, *, length: int) -> Tensor:
        """Give `y` of `[B, M, ...]` its unpruned length back: `[B, length, ...]`.

        A dropped position carries the value of the nearest earlier kept one, or of the first kept one where none is
        earlier.
        """
        return gather(y, self.source(length=length))

    def source(self, *, length: int) -> Tensor:
        """For each of `length` unpruned positions the slot that it is restored from, `[B, length]` int64."""
        slots = torch.arange(self.index.shape[1], dtype=torch.int64, device=self.index.device).expand_as(self.index)
        first = torch.zeros_like(slots[:, :1])
        if self.valid is not None:  # a padding slot is no source
            first = self.valid.to(torch.uint8).argmax(dim=1, keepdim=True)
            slots = torch.where(self.valid, slots, first)
        source = first.repeat(1, length).scatter_(1, self.index, slots)
        return source.cummax(dim=1).values

    def then(self, other: "Keep") -> "Keep":
        """The reduction that does this one first and `other` (positions among the kept tokens) after it.

        Its tensors stand on the device of this one's index; those of `other` may stand on another device.

        Raises:
            InputError: `other` does not fit the rows of this one.
        """
        _check_rows(self.index, other.index)
        valid = None if other.valid is None else other.valid.to(self.index.device)
        if self.valid is not None:
            here = gather(self.valid.to(self.index.device), other.index)
            valid = here if valid is None else valid & here
        return Keep(gather(self.index, other.index), valid, other.radius)


@dataclass(frozen=True)
class Merge:
    """Merge the tokens of every row into groups. A group stands at the place of one of its tokens.

    Attributes:
        index: `[B, M]` int64, the position that each group stands at, ascending in each row.
        assign: `[B, N]` int64, the group (0 to M - 1) that each token goes to.
        weight: `[B, N]` fp32 above 0, what a token counts in the mean of its group; None where all count alike.
        biased: whether attention is to see a group as often as it has tokens: the log of their number is added to the
            logits.
    """

    index: Tensor
    assign: Tensor
    weight: Tensor | None = None
    biased: bool = False

    valid: ClassVar[None] = None
    """All rows have the same number of groups."""
    radius: ClassVar[None] = None
    """Nothing is dropped."""

    def apply(self, x: Tensor) -> Tensor:
        """Weighted means `[B, M, ...]` of `x` `[B, N, ...]` over the groups, summed in fp32, in the dtype of `x`.

        The order of the sum is fixed: equal inputs give equal bits.
        """
        assign = self.assign.to(x.device)
        flat = x.float().flatten(2) if x.ndim > 2 else x.float()[:, :, None]
        share = self._shares().to(x.device)
        rows = torch.arange(len(assign), dtype=torch.int64, device=x.device)[:, None] * self.index.shape[1]
        out = flat.new_zeros(self.index.numel(), flat.shape[2])
        out = add_at(out, (assign + rows).flatten(), (flat * share[:, :, None]).flatten(0, 1))
        return out.view(*self.index.shape, *x.shape[2:]).to(x.dtype)

    def restore(self, y: Tensor, *, length: int) -> Tensor:
        """Give `y` of `[B, M, ...]` its `length` tokens back: each carries the value of its group, `[B, length, ...]`.

        Raises:
            InputError: `length` is not N.
        """
        if length != self.assign.shape[1]:
            raise InputError(f"{self.assign.shape[1]} tokens were merged, {length} cannot be restored")
        return gather(y, self.assign)

    def sizes(self) -> Tensor:
        """What the tokens of each group count together, `[B, M]` fp32: their number where there are no weights."""
        weight = self._weights()
        none = torch.zeros(self.index.shape, dtype=torch.float32, device=weight.device)
        return none.scatter_add_(1, self.assign, weight)

    def then(self, other: "Merge") -> "Merge":
        """The reduction that does this one first and `other` (over its groups) after it.

        Its means are those of the two in turn, so a token's weight is its share of its first group times that group's
        weight in the second.

        Raises:
            InputError: `other` does not fit the rows of this one.
        """
        _check_rows(self.index, other.index)
        weight = self._shares() if other.weight is None else self._shares() * gather(other.weight, self.assign)
        biased = self.biased or other.biased
        return Merge(gather(self.index, other.index), gather(other.assign, self.assign), weight, biased)

    def _weights(self) -> Tensor:
        """What each token counts, `[B, N]` fp32."""
        return torch.ones_like(self.assign, dtype=torch.float32) if self.weight is None else self.weight.float()

    def _shares(self) -> Tensor:
        """Weight of each token over the weight of its group, `[B, N]` fp32."""
        return self._weights() / gather(self.sizes(), self.assign)


Reduction = Keep | Merge


def _check_rows(first: Tensor, second: Tensor) -> None:
    if first.shape[0] != second.shape[0]:
        raise InputError(
            f"a reduction of {second.shape[0]} rows cannot follow one of {first.shape[0]} rows; give both the same rows"
        )


def pack(kept: Tensor, *, left: bool = False) -> Keep:
    """Pack rows that keep different positions into one `Keep` whose width is that of the longest row.

    The padding slots of a short row hold positions that it dropped, marked invalid and at their place, so that the
    order of the sequence stands. Where all rows keep all positions, the result is the identity.

    Args:
        kept: `[B, L]` bool, whether a position is kept.
        left: whether padding slots come first, as recurrent layers need it, and not at their place.

    Returns:
        `Keep` with `index` `[B, M]`, M the largest number of kept positions (at least 1), and `valid` `[B, M]`, None
        where all slots count.
    """
    length, counts = kept.shape[1], kept.sum(dim=1)
    width = max(1, int(counts.max()))
    if bool((counts == width).all()):
        return Keep(kept.nonzero()[:, 1].view(-1, width))
    # Kept positions first, then dropped ones from the right; the first `width` of that order, back in ascending order.
    order = kept.flip(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    index = (length - 1 - order).sort(dim=1).values
    valid = kept.gather(1, index)
    if left:
        order = valid.to(torch.uint8).argsort(dim=1, stable=True)
        index, valid = index.gather(1, order), valid.gather(1, order)
    return Keep(index, valid)
