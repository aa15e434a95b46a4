"""Which tokens of a forward are visual, and which of them make one image (or one frame)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.upstream.calls import embedding_of
from tokenprune.upstream.check import version_of
from tokenprune.upstream.families import Family, axes_of, breaks_lines, pixels_per_token, placeholder_id
from tokenprune.upstream.prompts import Prompt


@dataclass
class Image:
    """The visual tokens of one image (or one frame) of one row.

    Attributes:
        row: row of the batch.
        ordinal: number of the image within its row.
        tokens: `[n]` int64, positions in the sequence of this call, ascending.
        grid: rows and columns of the token grid, None where the tokens are not one grid.
    """

    row: int
    ordinal: int
    tokens: Tensor
    grid: tuple[int, int] | None


def placeholders(root: nn.Module, prompt: Prompt, *, field: str) -> Tensor | None:
    """Where the placeholders of one kind stand, `[B, L]` bool; None where the model has no such kind.

    Args:
        root: the module that holds the text decoder.
        prompt: what it was called with.
        field: field of its config that holds the placeholder's id.
    """
    token_id = placeholder_id(root, field)
    if token_id is None:
        return None
    if prompt.ids is not None:
        return prompt.ids == token_id
    embeds = prompt.embeds
    if embeds is None:
        return None
    return torch.eq(embeds, embedding_of(root, token_id, like=embeds)).all(-1)


def refuse_unknown_features(root: nn.Module, family: Family, prompt: Prompt, embeds: Tensor) -> None:
    """Check that a call without image features that are known carries none: placeholders have the same embedding
    everywhere until features take their places.

    Args:
        root: the module that holds the text decoder.
        family: its family.
        prompt: what it was called with.
        embeds: what the decoder is to get, `[B, L, D]`.

    Raises:
        UnsupportedModelError: the embeddings of placeholders were replaced by something.
    """
    if prompt.ids is None or prompt.ids.shape != embeds.shape[:2]:
        return
    for field in family.ids:
        mask = placeholders(root, prompt, field=field)
        found = None if mask is None else embeds[mask.to(embeds.device)]
        if found is not None and len(found) > 1 and not bool((found == found[:1]).all()):
            raise UnsupportedModelError(
                f"{len(found)} visual tokens carry image features, and none of the arguments of {type(root).__name__} "
                f"is known to hold any: {', '.join(prompt.names)} (transformers {version_of()}); nothing was pruned"
            )


def _by_axes(image: Tensor, axes: Tensor) -> list[tuple[Tensor, tuple[int, int] | None]]:
    """Split a run of visual tokens into frames by their M-RoPE time and read off each frame's grid.

    Args:
        image: positions of the run, `[n]`, ascending.
        axes: time, row and column of every token of the row of the batch, `[3, L]`.
    """
    frames = _split_where(image, axes[0, image].diff() != 0)
    grids = [tuple(len(set(axes[axis, frame].tolist())) for axis in (1, 2)) for frame in frames]
    return [(frame, (h, w) if h * w == len(frame) else None) for frame, (h, w) in zip(frames, grids, strict=True)]


def _sizes(root: nn.Module, family: Family, prompt: Prompt, total: int, *, video: bool, joins: bool) -> list[int]:
    """Tokens of each image in the order of the placeholders; empty where the prompt does not tell."""
    stacked = family.rows_are_images or (video and family.frame_tokens is None)
    if (sizes := prompt.encoded_sizes(video=video, stacked=stacked)) is not None:
        return sizes
    if joins and prompt.pixel_sizes is not None:
        unit = pixels_per_token(root)
        return [(h // unit) * (w // unit) for h, w in prompt.pixel_sizes]
    n_images = prompt.n_images(video=video) if stacked else None
    return [total // n_images] * n_images if n_images and total % n_images == 0 else []


def _split_where(tokens: Tensor, breaks: Tensor) -> list[Tensor]:
    """Split positions `[n]` after each one where `breaks` `[n - 1]` is True."""
    if not len(tokens):
        return []
    return list(tokens.tensor_split((breaks.nonzero()[:, 0] + 1).tolist()))


def _runs(tokens: Tensor) -> list[Tensor]:
    """Split ascending positions `[n]` where they are not consecutive."""
    return _split_where(tokens, tokens.diff() != 1)


def _split(rows: list[Tensor], sizes: list[int], *, joins: bool) -> list[list[Tensor]]:
    """Positions of each image of each row. Sizes that do not fit the rows are left aside."""
    by_run = [_runs(row) for row in rows]
    if sum(sizes) != sum(map(len, rows)):
        return by_run
    by_size: list[list[Tensor]] = []
    left = iter(sizes)
    for row in rows:
        mine: list[int] = []
        while sum(mine) < len(row):
            mine.append(next(left))
        if sum(mine) != len(row):
            return by_run
        by_size.append(list(torch.split(row, mine)) if mine else [])
    if joins:
        return by_size
    return [[run for image in images for run in _runs(image)] for images in by_size]


def _frames(video: Tensor, per_frame: int) -> list[Tensor]:
    """Split a video's tokens into frames; tokens left over (a newline) go with the last frame."""
    n_frames = max(1, len(video) // per_frame)
    return list(torch.split(video, [per_frame] * (n_frames - 1) + [len(video) - per_frame * (n_frames - 1)]))


def _grid_of(root: nn.Module, family: Family, image: Tensor, *, joins: bool) -> tuple[int, int] | None:
    """The grid of an image: its lines where they are told apart, else a square where its family has such."""
    if joins:
        lines = [len(line) for line in _runs(image)]
        return (len(lines), lines[0]) if len(set(lines)) == 1 else None
    n_tokens = len(image)
    side = math.isqrt(n_tokens)
    wanted = family.square(root.config) if callable(family.square) else family.square
    return (side, side) if side * side == n_tokens and wanted in (None, n_tokens) else None


def _images_of_row(
    image: Tensor, root: nn.Module, family: Family, axes: Tensor | None, *, video: bool, joins: bool
) -> list[tuple[Tensor, tuple[int, int] | None]]:
    """The images or frames in one stretch of visual tokens, each with its grid."""
    if axes is not None:
        return _by_axes(image, axes)
    if video and family.frame_tokens is not None:
        per_frame = family.frame_tokens(root.config)
        side = math.isqrt(per_frame)
        return [(frame, (side, side) if side * side == len(frame) else None) for frame in _frames(image, per_frame)]
    return [(image, _grid_of(root, family, image, joins=joins))]


def find_images(root: nn.Module, family: Family, prompt: Prompt, positions: Tensor | None) -> list[Image]:
    """The images of a forward, by row and in the order of the sequence.

    A run of visual tokens without text between is one image, unless the prompt tells where one image ends and the next
    begins; the frames of a video are told apart.

    Args:
        root: the module that holds the text decoder.
        family: its family.
        prompt: what it was called with.
        positions: positions that the decoder is to get; with M-RoPE they tell frames and grids.
    """
    axes = axes_of(positions, family)
    images: list[Image] = []
    for field in family.ids:
        mask = placeholders(root, prompt, field=field)
        if mask is None:
            continue
        video = field.startswith("video")
        rows = [row.nonzero()[:, 0] for row in mask.cpu()]
        joins = not video and breaks_lines(root, family)
        sizes = _sizes(root, family, prompt, sum(map(len, rows)), video=video, joins=joins)
        for row, row_images in enumerate(_split(rows, sizes, joins=joins)):
            row_axes = None if axes is None else axes[:, row]
            for image in row_images:
                for tokens, grid in _images_of_row(image, root, family, row_axes, video=video, joins=joins):
                    images.append(Image(row, 0, tokens, grid))
    images.sort(key=lambda image: (image.row, int(image.tokens[0])))
    seen: dict[int, int] = {}
    for found in images:
        found.ordinal = seen.get(found.row, 0)
        seen[found.row] = found.ordinal + 1
    return images
