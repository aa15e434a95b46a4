"""The torch version of `tokenprune.ops.max_min_select`, a row at a time; `tokenprune.ops` is the door to it.

A row is worked on by itself and without its invalid tokens, so that every product has the shape, and every sum the
rounding, that the row has alone. Products run where the features lie; the greedy choice itself, a few operations on
short vectors per token, runs in NumPy, whose calls cost a fraction of torch's.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenprune.ops.backend import product, uncast

MEMORY = (
    64 << 20
)  # Extra memory that may always be taken; beyond it, as much as the features of the row take themselves.
_BLOCK = 8 << 20  # No temporary of the blockwise paths is larger.
_SAME = 2.0**-20  # A cosine distance below this is fp32 noise and counts as 0.
_SUSPECT = (
    2.0**-10
)  # Equal vectors come out closer than this however wide they are; only such tokens are fingerprinted.

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]
_Stop = Callable[[int, float], bool]


class _Units:
    """The unit vectors `[n, D]` of the valid tokens of one row in fp32, held whole where the memory bound allows it.

    Where it does not, they are made block by block: half-precision features would need twice their own bytes.
    """

    def __init__(self, tokens: Tensor, position: Tensor | None) -> None:
        self.tokens, self.position = tokens, position
        self.n = len(tokens) if position is None else len(position)
        width = tokens.shape[1]
        memory = max(MEMORY, self.n * width * tokens.element_size())
        self.step = max(1, min(1024, _BLOCK // (4 * width)))
        fits = 4 * self.n * width + 3 * _BLOCK <= memory
        held = 4 * self.n * (self.n + width + min(self.n, width) + 64)
        self.holds_similarity = fits and tokens.device.type == "cpu" and held <= memory
        self.whole = self._all(_unit) if fits and not self.holds_similarity else None

    def _all(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        out = torch.empty(self.n, self.tokens.shape[1], dtype=torch.float32, device=self.tokens.device)
        for i in range(0, self.n, self.step):
            out[i : i + self.step] = make(self._raw(slice(i, i + self.step)))
        return out

    def _raw(self, where: slice | Tensor) -> Tensor:
        if self.position is not None:
            where = self.position[where]
        rows = self.tokens[where] if isinstance(where, slice) else self.tokens.index_select(0, where)
        return rows.float().contiguous()

    def at(self, where: slice | Tensor) -> Tensor:
        """The unit vectors `[m, D]` at a slice or an index."""
        return _unit(self._raw(where)) if self.whole is None else self.whole[where]

    def similarity(self) -> Tensor:
        """All cosines `[n, n]`, with `-inf` on the diagonal."""
        out = self._scaled() if self.n <= self.tokens.shape[1] else None
        return (_gram(self._all(_unit)) if out is None else out).fill_diagonal_(-torch.inf)

    def _scaled(self) -> Tensor | None:
        """Cosines from the products of the tokens as they are: fewer numbers to scale; `None` for extreme lengths."""
        rows = self.tokens
        aligned = rows.data_ptr() % 64 == 0  # Where it is not, a product may be rounded in another way.
        if self.position is not None or rows.dtype != torch.float32 or not rows.is_contiguous() or not aligned:
            rows = self._all(_same)
        out = _gram(rows)
        length = out.diagonal().sqrt()
        if not (length.min() > 1e-9 and length.max() < 1e9):
            return None
        return out.div_(length[:, None] * length)  # By one product, so that both halves are rounded alike.

    def nearest(self) -> Tensor:
        """The largest cosine `[n]` of every token to another one, from one half of the blocks."""
        out = torch.full((self.n,), -torch.inf, dtype=torch.float32, device=self.tokens.device)
        for i in range(0, self.n, self.step):
            rows, mine = self.at(slice(i, i + self.step)), out[i : i + self.step]
            torch.maximum(mine, product(rows, rows.T).fill_diagonal_(-torch.inf).amax(1), out=mine)
            for j in range(i + self.step, self.n, self.step):
                block, theirs = product(rows, self.at(slice(j, j + self.step)).T), out[j : j + self.step]
                torch.maximum(mine, block.amax(1), out=mine)
                torch.maximum(theirs, block.amax(0), out=theirs)
        return out

    def nearest_of(self, index: list[int]) -> _Floats:
        """The largest cosine `[n]` of every token to one of the tokens `index`."""
        rows = self.at(torch.tensor(index, dtype=torch.int64, device=self.tokens.device))
        parts = [product(rows, self.at(slice(i, i + self.step)).T).amax(0) for i in range(0, self.n, self.step)]
        return _numpy(torch.cat(parts))

    def fingerprint(self, index: _Ints) -> _Ints:
        """A hash `[m]` of the bits of tokens: integer arithmetic, so equal tokens agree wherever they stand."""
        draw = np.random.default_rng(0).integers(-(2**62), 2**62, self.tokens.shape[1]) * 2 + 1
        weight, where = (torch.from_numpy(array).to(self.tokens.device) for array in (draw, index))
        step = max(1, self.step // 4)  # The products are 64 bits wide.
        parts = (self._raw(where[i : i + step]) + 0.0 for i in range(0, len(index), step))
        return np.concatenate([(part.view(torch.int32) * weight).sum(1).cpu().numpy() for part in parts])


def _gram(rows: Tensor) -> Tensor:
    """Dot products `[n, n]` of rows, one half computed and mirrored."""
    n = len(rows)
    out = torch.empty(n, n, dtype=torch.float32, device=rows.device)
    step = n if n < 512 else -(-n // 4)  # Small products gain nothing from halving.
    for i in range(0, n, step):
        j = min(i + step, n)
        product(rows[i:j], rows[i:].T, out=out[i:j, i:])
        out[j:, i:j] = out[i:j, j:].T
    return out


def _same(rows: Tensor) -> Tensor:
    return rows


def _unit(rows: Tensor) -> Tensor:
    """Rows `[m, D]` in fp32 divided by their lengths; a zero vector stays zero, one that is not finite becomes zero."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit: Tensor = rows / length.clamp_min(1e-12)
    broken = ~length[:, 0].isfinite()
    return unit.masked_fill_(broken[:, None], 0.0) if broken.any() else unit


def _numpy(vector: Tensor) -> _Floats:
    array: _Floats = vector.cpu().numpy()
    return array


def choose(tokens: Tensor, valid: Tensor | None, most: int, least: int, radius: float = -1.0) -> tuple[Tensor, Tensor]:
    """Choose tokens of one row; see `tokenprune.ops.max_min_select` for the rule.

    Args:
        tokens: `[N, D]`, any float dtype, any strides.
        valid: `[N]` bool, at least `least` of them true; all tokens by default.
        most: tokens to choose at most; as many as are valid where that is less.
        least: tokens to choose at least; only from there on may the radius end the search.
        radius: the covering radius at which to end; none by default.

    Returns:
        The tokens `[M]` int64 as they were chosen, and the covering radius `[M]` fp32 after each; both on the CPU.
    """
    units = _Units(tokens, None if valid is None else valid.nonzero()[:, 0])

    def stop(count: int, best: float) -> bool:
        return count >= most or best < _SAME or (best <= radius and count >= least)

    with uncast(units.tokens):
        sim = units.similarity() if units.holds_similarity else None
        gap = 1 - _numpy(units.nearest() if sim is None else sim.amax(1))
        equal, repeats = _equal(units, np.flatnonzero(gap < _SUSPECT))
        gap[equal] = 0
        order, reach = [int(np.where(gap < _SAME, 0, gap).argmax())], [np.inf]
        # A token equal to an earlier one cannot win before it and is at distance 0 after it: it may be from the start.
        gap[:] = np.inf
        gap[repeats] = 0
        if sim is None:
            _pick_lazily(units, gap, order, reach, stop)
        else:
            np.minimum(gap, 1 - sim[order[0]].numpy(), out=gap)
            gap[order] = -1
            _pick(sim.numpy(), gap, np.arange(units.n), order, reach, stop)
    final = float(gap.max())
    if len(order) < least:  # What is left ties at distance 0, or a rounding below it.
        order += np.flatnonzero(gap > -1)[: least - len(order)].tolist()
    path = reach[1:] + [final if final >= _SAME else 0.0] * (1 + len(order) - len(reach))
    chosen = torch.tensor(order, dtype=torch.int64, device="cpu")
    if units.position is not None:
        chosen = units.position.cpu()[chosen]
    return chosen, torch.tensor(path, dtype=torch.float32, device="cpu")


def _equal(units: _Units, suspects: _Ints) -> tuple[_Ints, _Ints]:
    """Of tokens close to another one: those that equal another one bit for bit, and those that equal an earlier one."""
    if not len(suspects):
        return suspects, suspects
    prints = units.fingerprint(suspects)
    _, first, group, size = np.unique(prints, return_index=True, return_inverse=True, return_counts=True)
    return suspects[size[group] > 1], np.delete(suspects, first)


def _pick(
    sim: _Floats,
    gap: _Floats,
    index: _Ints,
    order: list[int],
    reach: list[float],
    stop: _Stop,
    bar: tuple[float, int] = (-1.0, 0),
) -> None:
    """Choose among the candidates `index` `[c]` until `stop`, or until a token that is no candidate might win.

    Args:
        sim: `[c, c]`, the cosines among the candidates.
        gap: `[c]`, their distance to the chosen set, `-1` for the chosen themselves; brought up to date in place.
        index: `[c]`, ascending.
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


def _pick_lazily(units: _Units, gap: _Floats, order: list[int], reach: list[float], stop: _Stop) -> None:
    """`_pick` over all tokens without their similarity: exact, and nearly all of its work is in large products.

    Distances to the chosen set only shrink, so those of the last round bound the true ones from above. A round takes
    the farthest tokens as candidates and chooses among them, from their own small similarity, for as long as the best
    of them beats the bound of all the others; then one product brings every token up to date.
    """
    width, fresh = 32, order[:]
    while True:
        np.minimum(gap, 1 - units.nearest_of(fresh), out=gap)
        gap[fresh] = -1
        if stop(len(order), float(gap.max())):
            return
        index, bar = _farthest(gap, min(width, units.step))
        where = torch.from_numpy(index).to(units.tokens.device)
        rows = units.at(where)
        n_before = len(order)
        _pick(_numpy(product(rows, rows.T)), gap[index], index, order, reach, stop, bar)
        fresh = order[n_before:]
        width = min(2 * width, 256) if 2 * len(fresh) > width else max(width // 2, 32)


def _farthest(gap: _Floats, width: int) -> tuple[_Ints, tuple[float, int]]:
    """The `width` tokens of largest `gap`, ascending, ties to the lowest index; the best other one and its index."""
    if width >= len(gap):
        return np.arange(len(gap)), (-1.0, 0)
    least = np.partition(gap, -width)[-width]
    above, tied = np.flatnonzero(gap > least), np.flatnonzero(gap == least)
    index = np.sort(np.concatenate([above, tied[: width - len(above)]]))
    others = gap.copy()
    others[index] = -1
    first = int(others.argmax())
    return index, (float(others[first]), first)
