"""Where one image (or one frame) ends and the next begins, among the placeholders of a call.

What the prompt tells is taken if it fits the placeholders (:mod:`tokenprune.upstream.sizes`). Else a run of
placeholders without anything between is one image, which is right where a processor always puts something between two
images; where it need not, the image says that its boundaries are uncertain.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tokenprune.upstream.families import TILES, Family, breaks_lines
from tokenprune.upstream.prompts import Prompt
from tokenprune.upstream.sizes import Item, grouped, items, n_pieces

Grid = tuple[int, int] | None
_GUESSED = TILES[-1]


@dataclass
class Image:
    """The visual tokens of one image (or one frame) of one row.

    Attributes:
        row: row of the batch.
        tokens: `[n]` int64, positions in the sequence of this call, ascending.
        grid: rows and columns of the token grid, None where the tokens are not one grid.
        certain: whether it is known where the image begins and ends; if not, it is a run of visual tokens.
        ordinal: number of the image within its row.
        n_hidden: how many more tokens it has, which the attention mask hides.
    """

    row: int
    tokens: Tensor
    grid: Grid
    certain: bool = True
    ordinal: int = 0
    n_hidden: int = 0


def _split_where(tokens: Tensor, breaks: Tensor) -> list[Tensor]:
    """Split positions `[n]` after each one where `breaks` `[n - 1]` is True."""
    return list(tokens.tensor_split((breaks.nonzero()[:, 0] + 1).tolist())) if len(tokens) else []


def _runs(tokens: Tensor) -> list[Tensor]:
    """Split ascending positions `[n]` where they are not consecutive."""
    return _split_where(tokens, tokens.diff() != 1)


def _evenly(tokens: Tensor, n_frames: int) -> list[Tensor]:
    """Split a video's tokens into frames; tokens left over (a newline) go with the last frame."""
    size = len(tokens) // n_frames
    return list(torch.split(tokens, [size] * (n_frames - 1) + [len(tokens) - size * (n_frames - 1)]))


def _fitted(rows: list[Tensor], layouts: Iterable[list[Item]]) -> list[list[tuple[Tensor, Item]]] | None:
    """The tokens of each image of each row by the first of the layouts that fits the rows, None where none does."""
    for layout in layouts:
        left = iter([item for item in layout if item.tokens])
        found: list[list[Item]] = []
        for row in rows:
            mine: list[Item] = []
            while sum(item.tokens for item in mine) < len(row) and (item := next(left, None)) is not None:
                mine.append(item)
            found.append(mine)
        full = all(sum(item.tokens for item in mine) == len(row) for row, mine in zip(rows, found, strict=True))
        if layout and full and next(left, None) is None:
            return [
                list(zip(torch.split(row, [item.tokens for item in mine]), mine, strict=True)) if mine else []
                for row, mine in zip(rows, found, strict=True)
            ]
    return None


def _by_axes(run: Tensor, axes: Tensor) -> list[tuple[Tensor, Grid]] | None:
    """The frames in a run of visual tokens, each with its grid, by their rows and columns: time may stand still between
    frames that follow each other fast. None where rows and columns make no grid.

    Args:
        run: positions of the run, `[n]`, ascending.
        axes: time, row and column of every token of the row of the batch, `[3, L]`.
    """
    if (found := _by_grid(run, axes)) is not None:
        return found
    later = [_by_grid(part, axes) for part in _split_where(run, axes[0, run].diff() != 0)]
    if len(later) == len(run) or None in later:  # positions of text
        return None
    return [frame for frames in later if frames is not None for frame in frames]


def _by_grid(run: Tensor, axes: Tensor) -> list[tuple[Tensor, Grid]] | None:
    """The frames of one video (or the one of an image) in a run, each with its grid; None where they make none."""
    places = axes[1:, run]
    h, w = (len(axis.unique()) for axis in places)
    if len(run) % (h * w):
        return None
    frames = places.view(2, -1, h * w)
    whole = bool((frames == frames[:, :1]).all()) and bool((frames[:, 0, 0] == places.amin(dim=1)).all())
    return [(frame, (h, w)) for frame in torch.split(run, h * w)] if whole else None


@dataclass(frozen=True)
class Placed:
    """The placeholders of one kind.

    Attributes:
        root: the module that holds the text decoder.
        family: its family.
        prompt: what it was called with.
        rows: where they stand in each row, `[n]` int64 each.
        axes: time, row and column of every token `[3, B, L]`, where positions tell them.
        video: whether they hold videos.
    """

    root: nn.Module
    family: Family
    prompt: Prompt
    rows: list[Tensor]
    axes: Tensor | None
    video: bool

    def images(self) -> Iterator[Image]:
        """The images (or frames) in the order of the sequence."""
        total = sum(map(len, self.rows))
        if not total:
            return
        layouts = items(self.root, self.family, self.prompt, total, video=self.video)
        pieces = _fitted(self.rows, layouts) if self.family.tiles in ("", _GUESSED) else None
        for row, tokens in enumerate(self.rows):
            if pieces is None:
                found = self._from_runs(row, _runs(tokens))
            else:
                found = [image for piece, item in pieces[row] for image in self._from_layout(row, piece, item)]
            yield from found

    @property
    def _joins(self) -> bool:
        return not self.video and breaks_lines(self.root, self.family)

    def _from_layout(self, row: int, piece: Tensor, item: Item) -> list[Image]:
        """The frames of a video, or an image, whose tokens are known."""
        sure = item.whole or self.family.apart
        if item.frames is not None and (self.video or item.grid is not None):
            frames = _evenly(piece, item.frames)
            return [Image(row, frame, item.grid or self._grid(frame), sure) for frame in frames]
        runs = _runs(piece)
        if self.video and self.family.joins:
            sizes = grouped(self.root, _GUESSED, self.prompt, row, runs) or [1] * len(runs)
            return [Image(row, torch.cat(runs[end - n : end]), None, sure) for end, n in _ends(sizes)]
        lined = self.family.tiles == _GUESSED and not self.video and _are_lines(runs)
        if self._joins or lined:
            return [Image(row, piece, self._grid_of_lines(runs), sure)]
        framed = not self.video or self.family.frame_tokens is not None
        sure = self.family.apart if len(runs) > 1 else sure and framed
        return [image for run in runs for image in self._run(row, run, sure=sure)]

    def _from_runs(self, row: int, runs: list[Tensor]) -> list[Image]:
        """The images of a row by what stands between its runs of visual tokens."""
        if not runs:
            return []
        mode = "closed" if self._joins else self.family.tiles
        n_runs = sum(len(_runs(tokens)) for tokens in self.rows)
        alone = n_pieces(self.prompt, video=self.video) == n_runs and (not mode or n_runs == 1)
        sizes = grouped(self.root, mode, self.prompt, row, runs) if mode else None
        if sizes is None:
            sure = alone or (self.family.apart and (not mode or len(runs) == 1))
            return [image for run in runs for image in self._run(row, run, sure=sure)]
        sure = alone or self.family.apart
        return [image for end, n in _ends(sizes) for image in self._group(row, runs[end - n : end], sure=sure)]

    def _group(self, row: int, runs: list[Tensor], *, sure: bool) -> list[Image]:
        """The image in one or more runs of visual tokens."""
        if self._joins:
            return [Image(row, torch.cat(runs), self._grid_of_lines(runs), sure)]
        return self._run(row, runs[0], sure=sure) if len(runs) == 1 else [Image(row, torch.cat(runs), None, sure)]

    def _run(self, row: int, run: Tensor, *, sure: bool) -> list[Image]:
        """The images or frames in one run of visual tokens; `sure`: whether it is one where nothing else tells."""
        if self.axes is not None and (frames := _by_axes(run, self.axes[:, row])) is not None:
            return [Image(row, frame, grid) for frame, grid in frames]
        if self.video and self.family.frame_tokens is not None:
            n_frames = max(1, len(run) // self.family.frame_tokens(self.root.config))
            return [Image(row, frame, self._grid(frame), sure) for frame in _evenly(run, n_frames)]
        return [Image(row, run, self._grid(run), sure)]

    def _grid(self, tokens: Tensor) -> Grid:
        """A square, where the family has such."""
        side = math.isqrt(len(tokens))
        if self.video and self.family.frame_tokens is not None:
            wanted: int | None = self.family.frame_tokens(self.root.config)
        else:
            wanted = self.family.square(self.root.config) if callable(self.family.square) else self.family.square
        return (side, side) if side * side == len(tokens) and wanted in (None, len(tokens)) else None

    def _grid_of_lines(self, lines: list[Tensor]) -> Grid:
        sizes = [len(line) for line in lines]
        return (len(sizes), sizes[0]) if len(set(sizes)) == 1 and self.family.square != 0 else None


def _are_lines(runs: list[Tensor]) -> bool:
    """Whether runs are the lines of one image: as long as each other, with one token between."""
    gaps = {int(after[0] - before[-1]) for before, after in pairwise(runs)}
    return gaps == {2} and len({len(run) for run in runs}) == 1


def _ends(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Where each of `sizes` ends if they follow each other, with the size."""
    end = 0
    for size in sizes:
        end += size
        yield end, size
