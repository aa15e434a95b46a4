"""How long each visual token lasts, read off a session's traces, and the panel that shows it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lettering import Colour, font
from overlay import KEPT, MUTED, Box, cells_of, fit, outline, strip
from pictures import DemoError
from PIL import Image, ImageDraw, ImageEnhance

import tokenprune

EARLY = (92, 148, 255)  # outline of a token that goes at the second stage; KEPT is that of one that lasts longest


@dataclass(frozen=True)
class Lasting:
    """The visual tokens of one image or frame.

    Attributes:
        depth: for each token, how many of the stages it passed; 0 is dropped at the first.
        stages: where tokens may go: before the language model, or after one of its layers.
        grid: rows and columns of the tokens, None where they are not one grid over the image.
    """

    depth: tuple[int, ...]
    stages: tuple[str, ...]
    grid: tuple[int, int] | None

    @property
    def n_kept(self) -> int:
        """Tokens that are there after the first stage."""
        return sum(depth > 0 for depth in self.depth)


def lasting(traces: Sequence[tokenprune.Trace]) -> list[Lasting]:
    """For each image (or frame) of the first row of the batch, how long its tokens lasted.

    Raises:
        DemoError: the method did not see the image's tokens.
    """
    applied = [trace for trace in traces if trace.status == "applied" and trace.visual_indices]
    if not applied:
        reasons = ", ".join(dict.fromkeys(trace.reason for trace in traces)) or "it left no trace"
        raise DemoError(f"the method did not act on the image's tokens: {reasons}")
    visual = applied[0].visual_indices[0]
    depth = torch.zeros(len(visual), dtype=torch.int64)
    for trace in applied:
        depth += torch.isin(visual, trace.kept_indices[0])
    stages = tuple("before the LLM" if trace.layer is None else f"layer {trace.layer}" for trace in applied)
    sizes, grids = _images(applied, len(visual))
    parts = depth.split(sizes)
    return [Lasting(tuple(part.tolist()), stages, grid) for part, grid in zip(parts, grids, strict=True)]


def _images(applied: Sequence[tokenprune.Trace], total: int) -> tuple[list[int], list[tuple[int, int] | None]]:
    """Tokens and grid of each image: of the first trace that knows them, else all tokens as one image."""
    for trace in applied[:1]:
        if trace.images and sum(trace.images[0]) == total:
            grids = trace.grids[0] if trace.grids else (None,) * len(trace.images[0])
            return list(trace.images[0]), list(grids)
    return [total], [None]


def shade(depth: int, n_stages: int) -> Colour:
    """Outline of a token that passed `depth` of the stages."""
    share = 1.0 if n_stages < 2 else (depth - 1) / (n_stages - 1)
    first, last = EARLY, KEPT
    return tuple(round(a + (b - a) * share) for a, b in zip(first, last, strict=True))  # type: ignore[return-value]


def lasting_panel(image: Image.Image, size: tuple[int, int], shown: Lasting) -> Image.Image:
    """The image at `size` with the tokens that went on bright and outlined, the others dim and nearly grey.

    Tokens that are not a grid over the image stand in their order, line by line, on a plain ground.
    """
    rows, columns = shown.grid or strip(len(shown.depth))
    base = fit(image, size, stretch=True) if shown.grid else Image.new("RGB", size, (120, 126, 142))
    cells = cells_of(size, rows, columns)[: len(shown.depth)]
    panel = ImageEnhance.Brightness(ImageEnhance.Color(base).enhance(0.2)).enhance(0.32)
    pen = ImageDraw.Draw(panel)
    top = max(1, *shown.depth)
    for cell, depth in zip(cells, shown.depth, strict=True):
        if depth:
            part = base.crop(cell)
            panel.paste(ImageEnhance.Brightness(part).enhance(0.55 + 0.45 * depth / top) if depth < top else part, cell)
            outline(pen, cell, shade(depth, len(shown.stages)))
    return panel


def legend(pen: ImageDraw.ImageDraw, box: Box, stages: Sequence[str]) -> None:
    """What the outlines mean, on one line in `box`."""
    left, top, right, bottom = box
    middle, face = (top + bottom) // 2, font(18)
    if len(stages) < 2:
        pen.rectangle((left, top + 4, left + 18, bottom - 4), outline=KEPT, width=3)
        pen.text((left + 28, middle), f"kept ({stages[0]})", MUTED, face, anchor="lm")
        return
    opening, closing = f"dropped after {stages[1]}", "kept longest"
    pen.text((left, middle), opening, MUTED, face, anchor="lm")
    pen.text((right, middle), closing, MUTED, face, anchor="rm")
    start, end = left + round(face.getlength(opening)) + 12, right - round(face.getlength(closing)) - 12
    steps = len(stages)
    for step in range(steps):
        near, far = (start + (end - start) * place // steps for place in (step, step + 1))
        pen.rectangle((near, top + 6, far - 2, bottom - 6), fill=shade(step + 1, steps))
