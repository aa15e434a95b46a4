"""Which tokens of a forward are visual, and which of them make one image (or one frame)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.models.families import Family

_FEATURES = ("image_hidden_states", "image_embeds")


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


def has_features(inputs: dict[str, Any]) -> bool:
    """Whether a forward with these keyword arguments receives image or video features.

    Placeholders are looked for in such forwards only: one that was *generated* looks just like an image's.
    """
    encoded = inputs.get("mm_encoder_outputs") or {}
    if any(value is not None for value in encoded.values()):
        return True
    return any(
        value is not None and (key.startswith("pixel_values") or key in _FEATURES) for key, value in inputs.items()
    )


def placeholders(root: nn.Module, family: Family, inputs: dict[str, Any], *, field: str) -> Tensor | None:
    """Where the placeholders of one kind stand, `[B, L]` bool; None where the config knows no such kind.

    Args:
        root: the module that takes `input_ids` and calls the decoder.
        family: its family.
        inputs: keyword arguments of the root's forward.
        field: field of the config that holds the placeholder's id.
    """
    token_id = getattr(root.config, field, None)
    if token_id is None:
        return None
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor):
        return ids == int(token_id)
    embeds: Tensor = inputs["inputs_embeds"]
    wanted = root.get_input_embeddings()(torch.tensor(token_id, device=embeds.device))  # type: ignore[operator]
    return torch.eq(embeds, wanted.to(embeds)).all(-1)


def _by_axes(image: Tensor, axes: Tensor) -> list[tuple[Tensor, tuple[int, int] | None]]:
    """Split a run of visual tokens into frames by their M-RoPE time and read off each frame's grid.

    Args:
        image: positions of the run, `[n]`, ascending.
        axes: time, row and column of every token of the row of the batch, `[3, L]`.
    """
    frames = _split_where(image, axes[0, image].diff() != 0)
    grids = [tuple(len(set(axes[axis, frame].tolist())) for axis in (1, 2)) for frame in frames]
    return [(frame, (h, w) if h * w == len(frame) else None) for frame, (h, w) in zip(frames, grids, strict=True)]


def _sizes(config: Any, family: Family, inputs: dict[str, Any], total: int, *, video: bool, joins: bool) -> list[int]:
    """Tokens of each image in the order of the placeholders; empty where the inputs do not tell."""
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("video" if video else "image")
    features = getattr(encoded, "pooler_output", None)
    stacked = family.rows_are_images or (video and family.frame_tokens is None)
    if isinstance(features, Tensor):
        return [features.shape[1]] * features.shape[0] if features.ndim == 3 and stacked else []
    if isinstance(features, Sequence):
        return [math.prod(image.shape[:-1]) for image in features]
    if joins and inputs.get("image_sizes") is not None:
        unit = _patch(config)
        return [(h // unit) * (w // unit) for h, w in torch.as_tensor(inputs["image_sizes"]).tolist()]
    pixels = inputs.get("pixel_values_videos" if video else "pixel_values")
    if stacked and isinstance(pixels, Tensor) and pixels.ndim >= 4:
        n_images = math.prod(pixels.shape[:-3])
        return [total // n_images] * n_images if n_images and total % n_images == 0 else []
    return []


def _patch(config: Any) -> int:
    """Pixels between neighbouring tokens of a packed tower."""
    return int(config.vision_config.patch_size) * int(getattr(config, "spatial_merge_size", 1) or 1)


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


def _grid_of(config: Any, family: Family, image: Tensor, *, joins: bool) -> tuple[int, int] | None:
    """The grid of an image: its lines where they are told apart, else a square where its family has such."""
    if joins:
        lines = [len(line) for line in _runs(image)]
        return (len(lines), lines[0]) if len(set(lines)) == 1 else None
    n_tokens = len(image)
    side = math.isqrt(n_tokens)
    wanted = family.square(config) if callable(family.square) else family.square
    return (side, side) if side * side == n_tokens and wanted in (None, n_tokens) else None


def _images_of_row(
    image: Tensor, config: Any, family: Family, axes: Tensor | None, *, video: bool, joins: bool
) -> list[tuple[Tensor, tuple[int, int] | None]]:
    """The images or frames in one stretch of visual tokens, each with its grid."""
    if axes is not None:
        return _by_axes(image, axes)
    if video and family.frame_tokens is not None:
        per_frame = family.frame_tokens(config)
        side = math.isqrt(per_frame)
        return [(frame, (side, side) if side * side == len(frame) else None) for frame in _frames(image, per_frame)]
    return [(image, _grid_of(config, family, image, joins=joins))]


def find_images(root: nn.Module, family: Family, inputs: dict[str, Any], positions: Tensor | None) -> list[Image]:
    """The images of a forward, by row and in the order of the sequence.

    A run of visual tokens without text between is one image, unless the inputs tell where one image ends and the next
    begins; the frames of a video are told apart.

    Args:
        root: the module that takes `input_ids` and calls the decoder.
        family: its family.
        inputs: keyword arguments of the root's forward.
        positions: what the decoder is to get as `position_ids`; with M-RoPE they tell frames and grids.
    """
    config: Any = root.config
    axes = positions[-3:].cpu() if family.mrope and positions is not None and positions.ndim == 3 else None
    images: list[Image] = []
    for field in family.ids:
        mask = placeholders(root, family, inputs, field=field)
        if mask is None:
            continue
        video = field.startswith("video")
        rows = [row.nonzero()[:, 0] for row in mask.cpu()]
        joins = family.joins and not video and config.vision_config.model_type == "pixtral"
        sizes = _sizes(config, family, inputs, sum(map(len, rows)), video=video, joins=joins)
        for row, row_images in enumerate(_split(rows, sizes, joins=joins)):
            row_axes = None if axes is None else axes[:, row]
            for image in row_images:
                for tokens, grid in _images_of_row(image, config, family, row_axes, video=video, joins=joins):
                    images.append(Image(row, 0, tokens, grid))
    images.sort(key=lambda image: (image.row, int(image.tokens[0])))
    seen: dict[int, int] = {}
    for found in images:
        found.ordinal = seen.get(found.row, 0)
        seen[found.row] = found.ordinal + 1
    return images
