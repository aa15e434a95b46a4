"""How long each visual token lasts, read off a session's traces, and the panel that shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lettering import Colour, font
from overlay import KEPT, MUTED, Box, cells_of, fit, outline, strip
from pictures import DemoError
from PIL import Image, ImageDraw, ImageEnhance

import tokenprune

EARLY, MIDDLE = (92, 148, 255), (226, 104, 190)  # outlines of tokens that go early and later; KEPT lasts longest


@dataclass(frozen=True)
class Layout:
    """The images (or frames) of a prompt: visual tokens of each, and their grids where they are one over the image."""

    sizes: tuple[int, ...]
    grids: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class Lasting:
    """The visual tokens of one image or frame.

    Attributes:
        depth: for each token, how many of the stages it passed; 0 is dropped at the first.
        stages: where tokens may go: before the language model, or after one of its layers. Stages that no token of any
            image passes are left out.
        grid: rows and columns of the tokens, None where they are not one grid over the image.
    """

    depth: tuple[int, ...]
    stages: tuple[str, ...]
    grid: tuple[int, int] | None

    @property
    def n_kept(self) -> int:
        """Tokens that are there after the first stage."""
        return sum(depth > 0 for depth in self.depth)


def layout_of(model: Any, inputs: Mapping[str, Any]) -> Layout:
    """Where the visual tokens of a prompt stand; one forward, of the model as it is without any patch."""
    with tokenprune.patch(model, "uniform", keep=1.0) as session, torch.inference_mode():
        fresh = {name: dict(value) if type(value) is dict else value for name, value in inputs.items()}
        model(**fresh, use_cache=False)
        trace = session.traces[0]
    if not trace.images:
        raise DemoError(f"the prompt has no visual tokens: {trace.reason}")
    return Layout(trace.images[0], trace.grids[0])


def lasting(traces: Sequence[tokenprune.Trace], layout: Layout) -> list[Lasting]:
    """For each image (or frame) of the first row of the batch, how long its tokens lasted.

    Raises:
        DemoError: no method acted on the image's tokens in the language model.
    """
    applied = [trace for trace in traces if trace.status == "applied" and trace.visual_indices]
    if not applied:
        reasons = ", ".join(dict.fromkeys(trace.reason for trace in traces if trace.reason)) or "it left no trace"
        raise DemoError(f"the method did not act on the image's tokens: {reasons}")
    visual = applied[0].visual_indices[0]
    depth = torch.zeros(len(visual), dtype=torch.int64)
    for trace in applied:
        depth += torch.isin(visual, trace.kept_indices[0])
    names = ["before the LLM" if trace.layer is None else f"layer {trace.layer}" for trace in applied]
    stages = tuple(names[: max(1, int(depth.max()))])
    sizes, grids = layout.sizes, layout.grids
    if sum(sizes) != len(visual):
        sizes, grids = (len(visual),), (None,)
    return [
        Lasting(tuple(part.tolist()), stages, grid) for part, grid in zip(depth.split(list(sizes)), grids, strict=True)
    ]


def shade(depth: int, n_stages: int) -> Colour:
    """Outline of a token that passed `depth` of the stages: from EARLY by way of MIDDLE to KEPT."""
    place = 2.0 if n_stages < 2 else 2 * (depth - 1) / (n_stages - 1)
    first, last = (EARLY, MIDDLE) if place <= 1 else (MIDDLE, KEPT)
    share = place if place <= 1 else place - 1
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, last, strict=True))
    return red, green, blue


def lasting_panel(image: Image.Image, size: tuple[int, int], shown: Lasting) -> Image.Image:
    """The image at `size` with the tokens that went on bright and outlined, the others dim and nearly grey.

    Tokens that are not a grid over the image stand in their order, line by line, on a plain ground.
    """
    rows, columns = shown.grid or strip(len(shown.depth))
    base = fit(image, size, stretch=True) if shown.grid else Image.new("RGB", size, (120, 126, 142))
    cells = cells_of(size, rows, columns)[: len(shown.depth)]
    panel = ImageEnhance.Brightness(ImageEnhance.Color(base).enhance(0.2)).enhance(0.32)
    pen = ImageDraw.Draw(panel)
    top = len(shown.stages)
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
    opening, closing = f"dropped after {stages[1]}", "lasts longest"
    pen.text((left, middle), opening, MUTED, face, anchor="lm")
    pen.text((right, middle), closing, MUTED, face, anchor="rm")
    start, end = left + round(face.getlength(opening)) + 12, right - round(face.getlength(closing)) - 12
    steps = len(stages)
    for step in range(steps):
        near, far = (start + (end - start) * place // steps for place in (step, step + 1))
        pen.rectangle((near, top + 6, far - 2, bottom - 6), fill=shade(step + 1, steps))
