"""Which heads a layer keeps and by which scores, and tensors with an axis of heads without the others."""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from tokenprune import ops
from tokenprune.signals import AttentionPlan


@dataclass(frozen=True)
class Heads:
    """The query heads that a layer keeps, equally many in every row.

    Attributes:
        index: `[B, n]` int64, ascending.
        total: how many heads the layer has.
    """

    index: Tensor
    total: int

    @cached_property
    def common(self) -> tuple[int, ...] | None:
        """The heads where all rows keep the same ones, else None. On a GPU this waits for the selection."""
        rows: list[list[int]] = self.index.tolist()
        return tuple(rows[0]) if rows and all(row == rows[0] for row in rows) else None

    @cached_property
    def mask(self) -> Tensor:
        """`[B, total]` bool, True for heads that are kept."""
        mask = torch.zeros(len(self.index), self.total, dtype=torch.bool, device=self.index.device)
        return mask.scatter_(1, self.index, True)

    def take(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """The kept heads `[B, .., n, ..]` of `x` `[B, .., total, ..]`; `x` itself if they are all that it has."""
        if x.shape[dim] != self.total:
            return x
        if self.common is not None:
            return x.index_select(dim, self.index[0].to(x.device))
        return x.gather(dim, self._wide(self.index, x, dim))

    def widen(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """`x` `[B, .., n, ..]` with zeros for the other heads; `x` itself if it has them all."""
        if x.shape[dim] == self.total:
            return x
        zeros = x.new_zeros(*x.shape[:dim], self.total, *x.shape[dim + 1 :])
        if self.common is not None:
            return zeros.index_copy_(dim, self.index[0].to(x.device), x)
        return zeros.scatter(dim, self._wide(self.index, x, dim), x)

    def serving(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Of keys or values `[B, Hkv, L, K]` the heads that the kept query heads use: each one once where all of them
        are used by equally many, the tensors themselves if those are all KV heads; else one for each query head."""
        n_kv = tensors[0].shape[1]
        per_group = self.total // n_kv
        if self.common is None:
            index = self.index // per_group
            return tuple(x.gather(1, self._wide(index, x, 1)) for x in tensors)
        used = [head // per_group for head in self.common]
        groups = [(group, len(list(members))) for group, members in groupby(used)]
        if len({size for _, size in groups}) == 1:
            used = [group for group, _ in groups]
        if used == list(range(n_kv)):
            return tensors
        chosen = torch.tensor(used, dtype=torch.int64, device=tensors[0].device)
        return tuple(x.index_select(1, chosen.to(x.device)) for x in tensors)

    def _wide(self, index: Tensor, x: Tensor, dim: int) -> Tensor:
        """`index` `[B, n]` as it has to be for gathering along `dim` of `x`."""
        shape = [1] * x.ndim
        shape[0], shape[dim] = index.shape
        sizes = list(x.shape)
        sizes[dim] = index.shape[1]
        return index.to(x.device).view(shape).expand(sizes)


class Scored(Protocol):
    """What a forward knows of heads.

    Attributes:
        head_scores: `[B, H]` fp32, magnitudes of the heads' outputs so far; None while none was seen.
        heads: the heads that the last layer kept, if not all.
        heads_at: index of that layer.
    """

    head_scores: Tensor | None
    heads: Heads | None
    heads_at: int


def count_heads(fraction: float, n_heads: int) -> int:
    """How many of `n_heads` heads a layer keeps."""
    return max(1, int(n_heads * fraction + 1e-6))


def heads_of(state: Scored, plan: AttentionPlan, *, layer: int) -> Heads | None:
    """Which heads `layer` keeps: those with the highest scores among those that the layer before kept; None for all.

    Chosen when the layer asks for the first time, so that its own magnitudes have no say.
    """
    if state.head_scores is None:
        return None
    n_heads = state.head_scores.shape[1]
    n_keep = count_heads(plan.heads[layer], n_heads)
    if n_keep == n_heads:
        return None
    known = state.heads
    if known is None or (state.heads_at != layer and known.index.shape[1] != n_keep):
        scores = state.head_scores
        if known is not None:
            scores = scores.masked_fill(~known.mask.to(scores.device), -torch.inf)
        state.heads = Heads(ops.top_k_select(scores, k=n_keep), n_heads)
    state.heads_at = layer
    return state.heads


def note_magnitude(state: Scored, magnitude: Tensor, heads: Heads | None = None) -> None:
    """Add the magnitudes of a layer's heads to their scores.

    Args:
        state: what a forward knows of heads.
        magnitude: `[B, n]` fp32.
        heads: the heads that these are of; None for all.
    """
    if state.head_scores is None:
        state.head_scores = magnitude if heads is None else heads.widen(magnitude)
        return
    earlier = state.head_scores.to(magnitude.device)
    if heads is None or magnitude.shape[1] == heads.total:
        state.head_scores = earlier + magnitude
    else:
        state.head_scores = earlier.scatter_add(1, heads.index.to(magnitude.device), magnitude)
