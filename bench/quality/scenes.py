"""Images of real handwritten digits, composed on the fly, and everything that is known about them.

The digits are scikit-learn's `load_digits` (1,797 real 8x8 scans, part of the package, nothing is downloaded). They
are permuted with a fixed seed: the first 1,350 are for training, the other 447 are only ever used for evaluation,
fragments included. A scene is a 96x96 image: 2-5 digits of 20-28 pixels in six colours (no colour twice) at random
places, six coloured fragments of digits as distractors, a low-frequency coloured background and noise. Everything is
vectorised over the batch and seeded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

IMAGE = 96
PATCH = 8
GRID = IMAGE // PATCH
COLOURS = {
    "red": (0.95, 0.15, 0.12),
    "green": (0.15, 0.85, 0.20),
    "blue": (0.20, 0.30, 1.00),
    "yellow": (0.95, 0.90, 0.15),
    "purple": (0.75, 0.20, 0.90),
    "white": (0.97, 0.97, 0.97),
}
MAX_DIGITS = 5
N_TRAIN = 1350
BACKGROUND_DIGIT, BACKGROUND_COLOUR = 10, len(COLOURS)
_MARGIN = 16  # canvas border that glyph boxes may reach into
_GLYPH = 40  # side of the box a rotated digit is drawn in
_FRAGMENT = 16


@dataclass(frozen=True)
class SceneConfig:
    """What a scene may contain; the defaults are the evaluation's.

    Attributes:
        digits: Fewest and most digits in an image.
        size: Smallest and largest side of a digit in pixels.
        fragments: Number of distractors.
        noise: Standard deviation of the pixel noise (pixels are in [0, 1]).
        gap: Least distance in pixels between two digits' centres along either axis: order questions have one answer.
    """

    digits: tuple[int, int] = (2, 5)
    size: tuple[float, float] = (20.0, 28.0)
    fragments: int = 6
    noise: float = 0.02
    gap: float = 4.0


@dataclass(frozen=True)
class Scenes:
    """A batch of images and their contents; absent digits are -1.

    Attributes:
        pixels: [B, 3, 96, 96] in [0, 1].
        digit: [B, 5] class of each digit.
        colour: [B, 5] index into `COLOURS`.
        centre: [B, 5, 2] x and y in pixels.
        patch_digit: [B, 144] class of the digit in each patch, 10 for background.
        patch_colour: [B, 144] its colour, 6 for background.
    """

    pixels: Tensor
    digit: Tensor
    colour: Tensor
    centre: Tensor
    patch_digit: Tensor
    patch_colour: Tensor

    @property
    def present(self) -> Tensor:
        return self.digit >= 0


@cache
def glyphs(split: str) -> tuple[Tensor, Tensor]:
    """The digits of one split: images [n, 8, 8] in [0, 1] and classes [n]."""
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(20260101))
    chosen = order[:N_TRAIN] if split == "train" else order[N_TRAIN:]
    images = torch.from_numpy(data.images).float()[chosen] / 16
    return images, torch.from_numpy(data.target).long()[chosen]


def make_scenes(split: str, n: int, generator: torch.Generator, config: SceneConfig | None = None) -> Scenes:
    """Compose `n` scenes from the digits of `split`."""
    config = config or SceneConfig()
    images, classes = glyphs(split)
    low, high = config.digits
    count = torch.randint(low, high + 1, (n, 1), generator=generator)
    size = _uniform((n, MAX_DIGITS), *config.size, generator)
    centre, present = _place(size, count, config.gap, generator)
    pick = torch.randint(len(images), (n, MAX_DIGITS), generator=generator)
    colour = torch.rand(n, len(COLOURS), generator=generator).argsort(1)[:, :MAX_DIGITS]
    alpha = _draw(images[pick].flatten(0, 1), size.flatten(), centre.flatten(0, 1), _GLYPH, 0.25, generator)
    alpha = alpha.view(n, MAX_DIGITS, _GLYPH, _GLYPH) * present[..., None, None]

    canvas = _background(n, generator)
    if config.fragments:
        _add_fragments(canvas, images, centre, size, present, config.fragments, generator)
    _paste(canvas, alpha, _tint(colour, generator), _corner(centre, _GLYPH))
    pixels = canvas[:, :, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    pixels = (pixels + config.noise * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)

    slot = _patch_slot(alpha, centre)
    digit = classes[pick].masked_fill(~present, -1)
    colour = colour.masked_fill(~present, -1)
    return Scenes(
        pixels=pixels,
        digit=digit,
        colour=colour,
        centre=centre,
        patch_digit=_label(digit, slot, BACKGROUND_DIGIT),
        patch_colour=_label(colour, slot, BACKGROUND_COLOUR),
    )


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _place(size: Tensor, count: Tensor, gap: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres [B, 5, 2], each the first of 96 candidates that is clear of the earlier ones, and which digits fitted."""
    n, slots = size.shape
    candidates = _uniform((n, slots, 96, 2), 0, 1, generator)
    half = size[..., None, None] / 2
    candidates = half * 0.9 + candidates * (IMAGE - 1.8 * half)
    present = torch.arange(slots) < count
    centres = [candidates[:, 0, 0]]
    fits = [present[:, 0]]
    for k in range(1, slots):
        delta = (candidates[:, k, :, None] - torch.stack(centres, 1)[:, None]).abs()  # [B, candidates, earlier, 2]
        apart = 0.46 * (size[:, k, None] + size[:, :k])[:, None]
        clear = (delta.amax(-1) >= apart) & (delta.amin(-1) >= gap)
        clear = (clear | ~torch.stack(fits, 1)[:, None]).all(-1)
        first = clear.float().argmax(1)
        centres.append(candidates[torch.arange(n), k, first])
        fits.append(present[:, k] & clear.any(1))
    return torch.stack(centres, 1), torch.stack(fits, 1)


def _corner(centre: Tensor, box: int) -> Tensor:
    return (centre - box / 2).floor().long() + _MARGIN


def _draw(
    images: Tensor, size: Tensor, centre: Tensor, box: int, max_turn: float, generator: torch.Generator
) -> Tensor:
    """Opacity [M, box, box] of each glyph, turned, sheared and stretched a little, at its place in the box."""
    m = len(images)
    turn = _uniform((m,), -max_turn, max_turn, generator)
    shear = _uniform((m,), -0.15, 0.15, generator)
    stretch = _uniform((m,), 0.85, 1.1, generator)
    offset = centre + _MARGIN - _corner(centre, box) - box / 2
    axis = torch.arange(box) + 0.5 - box / 2
    x = axis[None, None, :] - offset[:, 0, None, None]
    y = axis[None, :, None] - offset[:, 1, None, None]
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    u, v = cos * x + sin * y, cos * y - sin * x
    u = (u + shear[:, None, None] * v) / stretch[:, None, None]
    grid = torch.stack((u, v), -1) / (size[:, None, None, None] / 2)
    alpha = F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
    return (alpha * 1.3).clamp(0, 1)


def _tint(colour: Tensor, generator: torch.Generator) -> Tensor:
    table = torch.tensor(list(COLOURS.values()))
    tint = table[colour] * _uniform((*colour.shape, 1), 0.85, 1.0, generator)
    return (tint + 0.04 * torch.randn(tint.shape, generator=generator)).clamp(0, 1)


def _background(n: int, generator: torch.Generator) -> Tensor:
    side = IMAGE + 2 * _MARGIN
    coarse = torch.rand(n, 3, 4, 4, generator=generator) * 0.35
    return F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)


def _add_fragments(
    canvas: Tensor,
    images: Tensor,
    centre: Tensor,
    size: Tensor,
    present: Tensor,
    fragments: int,
    generator: torch.Generator,
) -> None:
    """Draw small quarter digits where no digit is (a fragment for which 12 places fail is left out)."""
    n = len(canvas)
    spot = _uniform((n, fragments, 12, 2), 4, IMAGE - 4, generator)
    delta = (spot[:, :, :, None] - centre[:, None, None]).abs().amax(-1)
    clear = ((delta > size[:, None, None] / 2 + 3) | ~present[:, None, None]).all(-1)
    spot = spot.gather(2, clear.float().argmax(2)[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    pick = torch.randint(len(images), (n * fragments,), generator=generator)
    row, column = torch.randint(5, (2, n * fragments), generator=generator)
    rows = row[:, None, None] + torch.arange(4)[None, :, None]
    columns = column[:, None, None] + torch.arange(4)[None, None, :]
    quarter = images[pick][torch.arange(n * fragments)[:, None, None], rows, columns]
    side = _uniform((n * fragments,), 7, 11, generator)
    alpha = _draw(quarter, side, spot.flatten(0, 1), _FRAGMENT, 3.14, generator)
    alpha = alpha.view(n, fragments, _FRAGMENT, _FRAGMENT) * clear.any(2)[..., None, None]
    colour = torch.randint(len(COLOURS), (n, fragments), generator=generator)
    _paste(canvas, alpha, _tint(colour, generator), _corner(spot, _FRAGMENT))


def _flat_index(corner: Tensor, box: int) -> Tensor:
    """[..., box * box] positions of a box in the flattened canvas."""
    side = IMAGE + 2 * _MARGIN
    axis = torch.arange(box)
    rows = (corner[..., 1, None] + axis)[..., :, None] * side
    return (rows + (corner[..., 0, None] + axis)[..., None, :]).flatten(-2)


def _paste(canvas: Tensor, alpha: Tensor, tint: Tensor, corner: Tensor) -> None:
    """Blend every slot's box into the canvas, in place, slot after slot."""
    flat = canvas.view(*canvas.shape[:2], -1)
    index = _flat_index(corner, alpha.shape[-1])
    for k in range(alpha.shape[1]):
        where = index[:, k, None].expand(-1, 3, -1)
        opacity = alpha[:, k].flatten(1)[:, None]
        flat.scatter_(2, where, flat.gather(2, where) * (1 - opacity) + tint[:, k, :, None] * opacity)


def _patch_slot(alpha: Tensor, centre: Tensor) -> Tensor:
    """[B, 144] which digit slot has the most ink in each patch, -1 where there is hardly any."""
    n, slots = alpha.shape[:2]
    side = IMAGE + 2 * _MARGIN
    layer = torch.zeros(n, slots, side * side)
    layer.scatter_(2, _flat_index(_corner(centre, _GLYPH), _GLYPH), alpha.flatten(2))
    layer = layer.view(n, slots, side, side)[:, :, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    ink, slot = F.avg_pool2d(layer, PATCH).flatten(2).max(1)
    return slot.masked_fill(ink < 0.08, -1)


def _label(value: Tensor, slot: Tensor, background: int) -> Tensor:
    return torch.where(slot >= 0, value.gather(1, slot.clamp(min=0)), background)
