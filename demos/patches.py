"""Draw which source patches each token stands for that leaves a vision transformer."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lettering import font, paragraph
from overlay import BACKGROUND, GAP, INK, MARGIN, MUTED, Box, cells_of, fit, header
from pictures import DemoError
from PIL import Image, ImageDraw

import tokenprune

EMBEDDED_VIT = f"local-dir:{Path(__file__).resolve().parent / 'vit'}"
SIDE = 640


@dataclass(frozen=True)
class Encoder:
    """A vision transformer of timm and how it sees images."""

    name: str
    model: Any
    transform: Any
    settings: dict[str, Any]


def load_encoder(name: str) -> Encoder:
    """A model of timm with its weights: a name that `timm.create_model` takes, or the embedded one.

    Raises:
        DemoError: it cannot be had.
    """
    try:
        import timm
    except ImportError as error:
        raise DemoError("--vit needs timm: pip install timm") from error
    try:
        model = timm.create_model(name, pretrained=True).float().eval()
    except Exception as error:
        raise DemoError(f"timm cannot load {name!r}: {error}") from error
    settings = timm.data.resolve_model_data_config(model)
    label = "the embedded vision transformer" if name == EMBEDDED_VIT else name
    return Encoder(label, model, timm.data.create_transform(**settings, is_training=False), settings)


def guess(encoder: Encoder, pixels: torch.Tensor) -> str:
    """The largest entry of the model's answer and its probability."""
    with torch.no_grad():
        shares = encoder.model(pixels).softmax(-1)[0]
    labels = encoder.model.pretrained_cfg.get("label_names") or range(len(shares))
    best = int(shares.argmax())
    return f"{list(labels)[best]} ({100 * float(shares[best]):.0f} %)"


def draw_patches(
    encoder: Encoder, image: Image.Image, methods: tuple[tokenprune.Method, ...], title: str
) -> tuple[Image.Image, str]:
    """The picture as the model sees it, and the patches of each token that is left, in their mean colour.

    Returns:
        The page, and what the model says, dense and reduced.

    Raises:
        DemoError: the patches are not one square grid.
        TokenPruneError: the model cannot be reduced so.
    """
    pixels = encoder.transform(image.convert("RGB"))[None]
    dense = guess(encoder, pixels)
    with tokenprune.patch(encoder.model, list(methods)) as session:
        reduced = guess(encoder, pixels)
        told = [trace for trace in session.traces if trace.assignment is not None]
    if not told:
        raise DemoError("nothing was merged or dropped inside the encoder; choose tome or spatten")
    group = told[-1].assignment[0].tolist()  # type: ignore[index]
    side = math.isqrt(len(group))
    if side * side != len(group):
        raise DemoError(f"the {len(group)} patches of this model are not one square grid")
    mean, std = (torch.tensor(encoder.settings[key])[:, None, None] for key in ("mean", "std"))
    colours = ((pixels[0] * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0)
    seen = Image.fromarray(colours.numpy())
    size = (side * max(1, SIDE // side),) * 2
    cells = cells_of(size, side, side)
    panels = (fit(seen, size, stretch=True), _groups(fit(seen, size, stretch=True), cells, group, side))
    width = 2 * size[0] + GAP + 2 * MARGIN
    page = Image.new("RGB", (width, size[1] + 600), BACKGROUND)
    pen = ImageDraw.Draw(page)
    n_left = len(set(group) - {-1})
    y = header(pen, title, encoder.name, ((f"{len(group):,} -> {n_left:,}", "patches"),), width)
    captions = (
        ("The image", f"The model sees it as {side} x {side} patches. It says: {dense}."),
        (
            "What each token stands for",
            f"Patches between two lines are one token, shown in its mean colour. It says: {reduced}.",
        ),
    )
    ends = []
    for number, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        x = MARGIN + number * (size[0] + GAP)
        pen.text((x, y), caption[0], INK, font(26))
        page.paste(panel, (x, y + 42))
        below = y + 56 + size[1]
        ends.append(below + paragraph(pen, caption[1], (x, below), size[0], 20, MUTED))
    return page.crop((0, 0, width, max(ends) + MARGIN)), f"dense   {dense}\n  merged  {reduced}"


def _groups(panel: Image.Image, cells: list[Box], group: list[int], side: int) -> Image.Image:
    """The panel with each group of patches in its mean colour and a line where two groups meet."""
    members: dict[int, list[int]] = {}
    for patch, number in enumerate(group):
        members.setdefault(number, []).append(patch)
    small = panel.resize((side, side), Image.Resampling.BOX).load()
    shown = panel.copy()
    pen = ImageDraw.Draw(shown)
    for number, patches in members.items():
        seen = [small[patch % side, patch // side] for patch in patches]  # type: ignore[index]
        mean = tuple(sum(colour[i] for colour in seen) // len(seen) for i in range(3))
        for patch in patches:
            pen.rectangle(cells[patch], mean if number >= 0 else (40, 44, 54))
    for patch, (left, top, right, bottom) in enumerate(cells):
        if patch % side and group[patch] != group[patch - 1]:
            pen.line((left, top, left, bottom), (255, 255, 255), 2)
        if patch >= side and group[patch] != group[patch - side]:
            pen.line((left, top, right, top), (255, 255, 255), 2)
    return shown
