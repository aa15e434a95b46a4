"""What a prompt tells of where one image ends and the next begins: grids, sizes, pixels, features, and what stands
between the tiles of an image.

Several arguments may tell it, and which of them reach the model depends on who calls it: ``generate`` runs the vision
encoder itself and hands on its features alone. So each is asked in turn, and the one that fits the placeholders counts.
"""

import inspect
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.upstream.calls import embedding_of
from tokenprune.upstream.check import look_up
from tokenprune.upstream.families import Family, breaks_lines
from tokenprune.upstream.prompts import Prompt


@dataclass(frozen=True)
class Item:
    """One image or one video of a prompt.

    Attributes:
        tokens: its visual tokens, all frames together.
        frames: how many frames share them evenly (the rest goes with the last one); None where it is not known.
        grid: rows and columns of the tokens of a frame, where they are known.
        whole: whether it is known to be one: what ``generate`` cuts out of encoded features for a chunk of the prompt
            is not.
    """

    tokens: int
    frames: int | None = 1
    grid: tuple[int, int] | None = None
    whole: bool = True


def items(root: nn.Module, family: Family, prompt: Prompt, total: int, *, video: bool) -> Iterator[list[Item]]:
    """What each argument of a prompt says of its images (or videos), in the order of the placeholders; surest first.

    Args:
        root: the module that holds the text decoder.
        family: its family.
        prompt: what it was called with.
        total: placeholders of this kind.
        video: whether videos are asked for.
    """
    yield _gridded(root, prompt, video=video)
    yield _encoded(family, prompt, video=video)
    sizes = None if video else prompt.pixel_sizes
    if sizes is not None:
        yield _packed(root, prompt, sizes) if hasattr(root, _PACK) else _lined(root, family, sizes)
    yield _counted(family, prompt, total, video=video)


def _gridded(root: nn.Module, prompt: Prompt, *, video: bool) -> list[Item]:
    """Of the grids of images and videos."""
    grids, counted = prompt.grids(video=video)
    if not isinstance(grids, Tensor) or grids.ndim != 2 or grids.shape[1] not in (3, 4):
        return []
    if grids.shape[1] == 4:  # a coarse view of the whole image, then a fine one, with lines broken in both
        return [Item(h * w + height * width) for h, w, height, width in grids.tolist()]
    merge = 1
    if not counted:
        vision = look_up(root, "config.vision_config", role="config of the vision encoder")
        merge = int(getattr(vision, "spatial_merge_size", 1) or 1)
    found = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
    return [Item(t * h * w, t, (h, w)) for t, h, w in found]


def _encoded(family: Family, prompt: Prompt, *, video: bool) -> list[Item]:
    """Of features that were encoded before."""
    features = prompt.encoded(video=video)
    stacked = isinstance(features, Tensor)
    if stacked and (features.ndim != 3 or not (video or family.rows_are_images)):
        return []  # a row for each tile of an image
    frames = 1 if not video or (stacked and family.frame_tokens is None) else None
    sizes = [math.prod(image.shape[:-1]) for image in (() if features is None else features)]
    whole = len(sizes) > 1 or not prompt.is_cut(video=video)
    return [Item(size, frames, whole=whole) for size in sizes]


def _lined(root: nn.Module, family: Family, sizes: list[tuple[int, int]]) -> list[Item]:
    """Of the images' sizes in pixels, where each stretch of so many pixels is a token."""
    if not breaks_lines(root, family):
        return []
    patch = look_up(root, "config.vision_config.patch_size", role="size of patches")
    unit = int(patch) * int(getattr(root.config, "spatial_merge_size", 1) or 1)
    return [Item((h // unit) * (w // unit)) for h, w in sizes]


_PACK, _TILES = "pack_image_features", "image_size_to_num_patches"


def _packed(root: Any, prompt: Prompt, sizes: list[tuple[int, int]]) -> list[Item]:
    """Of the images' sizes in pixels, where a model cuts each into as many tiles as fit and packs their features: it is
    asked to pack empty ones."""
    modules = (sys.modules.get(cls.__module__) for cls in type(root).__mro__)
    count = next((found for module in modules if (found := getattr(module, _TILES, None)) is not None), None)
    if count is None:
        return []
    config = root.config
    side = config.vision_config.image_size
    tiles = [
        1 if uncut else count(list(size), config.image_grid_pinpoints, side)
        for size, uncut in zip(sizes, prompt.uncut_images or [False] * len(sizes), strict=True)
    ]
    n_tokens = (side // config.vision_config.patch_size) ** 2
    given = {
        "image_features": [torch.zeros(n, n_tokens, 1, dtype=torch.float32, device="cpu") for n in tiles],
        "image_sizes": torch.tensor(sizes, dtype=torch.int64, device="cpu"),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "vision_aspect_ratio": prompt.given.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", None),
        "image_newline": torch.zeros(1, dtype=torch.float32, device="cpu"),
    }
    taken = inspect.signature(getattr(root, _PACK)).parameters
    packed, _ = getattr(root, _PACK)(**{name: value for name, value in given.items() if name in taken})
    return [Item(len(image)) for image in packed]


def _counted(family: Family, prompt: Prompt, total: int, *, video: bool) -> list[Item]:
    """Of the number of images in the pixels, where all have the same number of tokens."""
    if (shape := prompt.stacked(video=video)) is None:
        return []
    n_frames = 1
    if video:
        *_, n, n_frames = (1, *shape)
    elif family.rows_are_images:
        n = math.prod(shape)
    elif family.tiles_stacked and len(shape) == 2:
        n = shape[0]
    else:
        return []
    return [Item(total // n, n_frames)] * n if n and total % n == 0 else []


def n_pieces(prompt: Prompt, *, video: bool) -> int | None:
    """How many images, tiles or frames the pixels or features of a prompt have; None where they do not tell."""
    features = prompt.encoded(video=video)
    if isinstance(features, Tensor):
        return features.shape[0] if features.ndim == 3 else None
    shape = prompt.stacked(video=video)
    return None if shape is None else math.prod(shape)


def grouped(root: nn.Module, mode: str, prompt: Prompt, row: int, runs: list[Tensor]) -> list[int] | None:
    """How many of the `runs` of visual tokens of a row belong to each image, by what stands between them; None where
    that does not tell.

    Args:
        root: the module that holds the text decoder.
        mode: how it tells: one of :data:`~tokenprune.upstream.families.TILES`.
        prompt: what it was called with.
        row: row of the batch.
        runs: positions of each run, ascending.
    """
    labels = prompt.labels(row) or []
    stops = [int(run[-1]) + 1 for run in runs]
    gaps = [labels[stop : int(run[0])] for stop, run in zip([0, *stops], runs, strict=False)]
    mark = _opener(root, prompt, row, labels) if mode == "opened" else next(iter(labels[stops[-1] :]), None)
    ends = [] if mark is None else _ends(mode, gaps, mark)
    places = [-1, *(place for place, ends_here in enumerate(ends) if ends_here)]
    images = [runs[before + 1 : after + 1] for before, after in pairwise(places)]
    even = all(len({len(run) for run in image}) == 1 for image in images)
    return [len(image) for image in images] if images and even else None


def _ends(mode: str, gaps: list[list[int]], mark: int) -> list[bool]:
    """Whether each run is the last of its image, as the last run of the row is; empty where that cannot be told.

    Args:
        mode: how it is recognised.
        gaps: labels of the tokens that stand before each run, back to the run before it.
        mark: label of the token that opens an image where one does, and else of the one behind the last run.
    """
    if mode == "opened":
        return [*(mark in gap for gap in gaps[1:]), True] if mark in gaps[0] else []
    if mode == "lined":
        return [*(len(gap) > 1 or gap != gaps[1] for gap in gaps[1:]), True]
    if mode == "closed":
        return [*(gap[0] == mark for gap in gaps[1:]), True]
    # The tag of a tile is what stands between it and the last mark before it.
    tags = [gap[len(gap) - gap[::-1].index(mark) :] if mark in gap else [] for gap in gaps]
    return [tag == tags[-1] for tag in tags] if all(tags) else []


def _opener(root: nn.Module, prompt: Prompt, row: int, labels: list[int]) -> int | None:
    """The label of the token that opens an image, None where there is none in a row."""
    ids: Any = getattr(getattr(root, "config", None), "visual_indicator_token_ids", None)
    if not ids or prompt.embeds is None:
        return int(ids[0]) if ids else None
    places = torch.eq(prompt.embeds[row], embedding_of(root, ids[0], like=prompt.embeds)).all(-1).tolist()
    return next((label for label, opens in zip(labels, places, strict=True) if opens), None)
