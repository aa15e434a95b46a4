"""The torch version of `tokenprune.ops.max_min_select`, a row at a time; `tokenprune.ops` is the door to it.

A row is worked on by itself and without its invalid tokens, so that every product has the shape, and every sum the
rounding, that the row has alone. Products run where the features lie; the greedy choice itself, a few operations on
short vectors per token, runs in NumPy, whose calls cost a fraction of torch's.

Distances to the chosen set only shrink, so those of an earlier round bound the true ones from above. A round takes the
farthest tokens as candidates and chooses among them, from their own small similarity, for as long as the best of them
beats the bound of all the others; then one product updates every token. That is exact, and nearly all of its
work is in large products. Where the similarity of all tokens fits into the memory allowed, all are candidates, and one
round is enough.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenprune.ops.backend import product, uncast
from tokenprune.ops.equal import fingerprint

MEMORY = 64 << 20  # Extra bytes that may always be taken; where the features of a row take more, as many as those.
_BLOCK = 8 << 20  # Bytes that no temporary of a product in blocks exceeds.
_SAME = 2.0**-20  # A cosine distance below this is fp32 noise and counts as 0.
_SUSPECT = 2.0**-10  # Equal vectors come out closer than this however wide they are; only such tokens are compared.

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]
_Stop = Callable[[int, float], bool]


class _Cosines:
    """The cosines between some tokens of a row, in fp32.

    Attributes:
        n: the number of tokens; indices and slices count these.
        step: tokens in a block.
        position: their positions in the row, by which they are copied; None for all tokens of a row that lies in memory
            as a copy would. Products of what begins elsewhere than at 64 bytes may be rounded in another way.
        inverse: `[n]`, what a token is multiplied with to become a unit vector; 0 where its length is not finite.
        similarity: all cosines `[n, n]` once `nearest` has run, where the memory bound lets them be held.
    """

    def __init__(self, tokens: Tensor, position: Tensor | None) -> None:
        if position is None and (tokens.data_ptr() % 64 or not tokens.is_contiguous()):
            position = torch.arange(len(tokens), dtype=torch.int64, device=tokens.device)
        self.tokens, self.position, self.similarity = tokens, position, None
        self.n, width = len(tokens) if position is None else len(position), tokens.shape[1]
        self.step = 16 * max(1, min(64, -(-self.n // 64), _BLOCK // (64 * width)))
        if 4 * self.n * (3 * self.n // 2 + width) <= max(MEMORY, self.n * width * tokens.element_size()):
            self.similarity = torch.empty(self.n, self.n, dtype=torch.float32, device=tokens.device)
        length = torch.cat([self.rows(block).square().sum(1) for block in self.blocks()]).sqrt_()
        self.inverse = (1 / length.clamp_min(1e-12)).masked_fill_(~length.isfinite(), 0.0)
        self.all_finite = bool(self.inverse.all())

    def blocks(self, start: int = 0) -> list[slice]:
        """The tokens from `start` on, so many at a time that products of them are small."""
        return [slice(i, min(i + self.step, self.n)) for i in range(start, self.n, self.step)]

    def rows(self, where: slice | Tensor) -> Tensor:
        """The tokens `[m, D]` at a slice or an index."""
        return self.tokens[where if self.position is None else self.position[where]].float()

    def between(self, left: slice | Tensor, right: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """Cosines of some tokens with some tokens, scaled by a product that is the same from either side."""
        scale = self.inverse[left, None] * self.inverse[right]
        found = product(self.rows(left), self.rows(right).T, out=out).mul_(scale)
        return found if self.all_finite else found.masked_fill_(scale == 0, 0.0)

    def nearest(self) -> Tensor:
        """The largest cosine `[n]` of every token to another one, from one half of the blocks."""
        if self.similarity is not None:
            for left in self.blocks():
                self.between(left, slice(left.start, self.n), out=self.similarity[left, left.start :])
                self.similarity[left.stop :, left] = self.similarity[left, left.stop :].T
            return self.similarity.fill_diagonal_(-torch.inf).amax(1)
        out = torch.full((self.n,), -torch.inf, dtype=torch.float32, device=self.tokens.device)
        for left in self.blocks():
            for right in self.blocks(left.start):
                cosines = self.between(left, right)
                if left == right:
                    cosines.fill_diagonal_(-torch.inf)
                out[left] = out[left].maximum(cosines.amax(1))
                out[right] = out[right].maximum(cosines.amax(0))
        return out

    def nearest_of(self, index: list[int]) -> _Floats:
        """The largest cosine `[n]` of every token to one of the tokens `index`."""
        where = torch.tensor(index, dtype=torch.int64, device=self.tokens.device)
        if self.similarity is not None:
            return _numpy(self.similarity[where].amax(0))
        return _numpy(torch.cat([self.between(where, block).amax(0) for block in self.blocks()]))

    def among(self, index: _Ints) -> _Floats:
        """The cosines `[m, m]` among candidates: all tokens, where those of all are held."""
        if self.similarity is not None:
            return _numpy(self.similarity)
        where = torch.from_numpy(index).to(self.tokens.device)
        return _numpy(self.between(where, where))

    def equal(self, suspects: _Ints) -> tuple[_Ints, _Ints]:
        """Of some tokens, those that equal another one of them bit for bit, and those that equal an earlier one."""
        step = max(1, self.step // 4)  # What a fingerprint is summed from is 64 bits wide.
        where = torch.from_numpy(suspects).to(self.tokens.device)
        parts = (self.rows(where[i : i + step]) + 0.0 for i in range(0, len(where), step))
        prints = np.concatenate([fingerprint(part).cpu().numpy() for part in parts])
        _, first, group, size = np.unique(prints, return_index=True, return_inverse=True, return_counts=True)
        return suspects[size[group] > 1], np.delete(suspects, first)


def _numpy(tensor: Tensor) -> _Floats:
    array: _Floats = tensor.cpu().numpy()
    return array


def choose(
    features: Tensor, valid: Tensor | None, most: int, least: int, radius: float = -1.0
) -> tuple[Tensor, Tensor]:
    """Choose tokens of every row; see `tokenprune.ops.max_min_select` for the rule.

    Args:
        features: `[B, N, D]`, any float dtype, any strides.
        valid: `[B, N]` bool, at least `least` of a row true; all tokens by default.
        most: tokens to choose at most; as many as are valid where that is less.
        least: tokens to choose at least; only from there on may the radius end the search.
        radius: the covering radius at which to end; none by default.

    Returns:
        `order [B, most]` int64, the tokens as they were chosen and then `-1`, and the covering radius `[B, most]` fp32
        after each, then 0; both on the device of the features.
    """
    order = torch.full((len(features), most), -1, dtype=torch.int64, device="cpu")
    path = torch.zeros(len(features), most, dtype=torch.float32, device="cpu")
    with uncast(features):
        for i, tokens in enumerate(features.detach()):
            position = None if valid is None else valid[i].nonzero()[:, 0]
            chosen, reach = _choose(_Cosines(tokens, position), most, least, radius)
            order[i, : len(chosen)] = (
                torch.tensor(chosen, dtype=torch.int64, device="cpu") if position is None else position.cpu()[chosen]
            )
            path[i, : len(reach)] = torch.tensor(reach, dtype=torch.float32, device="cpu")
    return order.to(features.device), path.to(features.device)


def _choose(tokens: _Cosines, most: int, least: int, radius: float) -> tuple[list[int], list[float]]:
    """The choice of one row, and the covering radius after each."""

    def stop(count: int, best: float) -> bool:
        return count >= most or best < _SAME or (best <= radius and count >= least)

    gap = 1 - _numpy(tokens.nearest())
    suspects, repeats = np.flatnonzero(gap < _SUSPECT), np.empty(0, np.int64)
    if len(suspects):
        equal, repeats = tokens.equal(suspects)
        gap[equal] = 0
    order, reach = [int(np.where(gap < _SAME, 0, gap).argmax())], [np.inf]
    # A token equal to an earlier one cannot win before it and is at distance 0 after it: it may be from the start.
    gap[:] = np.inf
    gap[repeats] = 0
    width, fresh = 32 if tokens.similarity is None else tokens.n, order[:]
    while True:
        np.minimum(gap, 1 - tokens.nearest_of(fresh), out=gap)
        gap[fresh] = -1
        if stop(len(order), float(gap.max())):
            break
        index, bar = _farthest(gap, width)
        n_before = len(order)
        _pick(tokens.among(index), gap[index], index, order, reach, stop, bar)
        fresh = order[n_before:]
        width = min(2 * width, 256) if 2 * len(fresh) > width else max(width // 2, 32)
    final = float(gap.max())
    if len(order) < least:  # What is left ties at distance 0, or a rounding below it.
        order += np.flatnonzero(gap > -1)[: least - len(order)].tolist()
    return order, reach[1:] + [final if final >= _SAME else 0.0] * (1 + len(order) - len(reach))


def _pick(
    sim: _Floats, gap: _Floats, index: _Ints, order: list[int], reach: list[float], stop: _Stop, bar: tuple[float, int]
) -> None:
    """Choose among candidates until `stop`, or until a token that is no candidate might win.

    Args:
        sim: `[c, c]`, the cosines among the candidates.
        gap: `[c]`, their distance to the chosen set, `-1` for the chosen themselves; updated in place.
        index: `[c]`, the candidates, ascending.
        order: the tokens chosen, appended to.
        reach: how far each was from the ones before it, appended to.
        stop: says whether to stop, from the number chosen and the largest distance left.
        bar: the largest distance among all other tokens and the first token that has it.
    """
    row, ones, tokens, (height, holder) = np.empty_like(gap), np.ones_like(gap), index.tolist(), bar
    while True:  # Some thousand turns: what they share is prepared above.
        j = int(gap.argmax())
        best, token = gap.item(j), tokens[j]
        if stop(len(order), best) or best < height or (best == height and token > holder):
            return
        order.append(token)
        reach.append(best)
        np.subtract(ones, sim[j], out=row)
        np.minimum(gap, row, out=gap)
        gap[j] = -1


def _farthest(gap: _Floats, width: int) -> tuple[_Ints, tuple[float, int]]:
    """The `width` tokens of largest `gap`, ascending, ties to the lowest index; the best other one and its index."""
    order = np.argsort(-gap, kind="stable")
    index, others = np.sort(order[:width]), order[width:]
    first = int(others[0]) if len(others) else 0
    return index, (float(gap[first]) if len(others) else -1.0, first)
