"""Draw which visual tokens were kept, and which kept token stands nearest to each dropped one. Pillow only."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lettering import Colour, font, lines, paragraph
from PIL import Image, ImageDraw, ImageEnhance

Box = tuple[int, int, int, int]

PANEL = 576  # longer side of a panel
LEAST_WIDTH = 480
MOST_LINKS = 300  # with more dropped tokens, lines to the kept ones would hide the picture
MARGIN = 36
GAP = 28
BACKGROUND, CARD, RULE = (15, 18, 25), (24, 28, 38), (52, 59, 76)
INK, MUTED = (238, 240, 246), (150, 159, 180)
KEPT, SAME, DIFFERENT = (255, 200, 87), (123, 216, 143), (255, 138, 112)
VERDICT = 120  # width of the last column of the table


@dataclass(frozen=True)
class Selection:
    """What happened to the visual tokens of one image.

    Attributes:
        kept: the tokens that went on, ascending, as numbers among the image's tokens.
        nearest: for each token the kept one with the highest cosine similarity; a kept token is its own.
        distance: for each token its cosine distance to that one.
        grid: rows and columns of the tokens, None where they are not one grid over the image.
    """

    kept: tuple[int, ...]
    nearest: tuple[int, ...]
    distance: tuple[float, ...]
    grid: tuple[int, int] | None

    @property
    def radius(self) -> float:
        """Largest cosine distance from a dropped token to its nearest kept one."""
        return max(self.distance)


@dataclass(frozen=True)
class Answer:
    """One question and what the model said, dense and pruned."""

    question: str
    dense: str
    pruned: str

    @property
    def same(self) -> bool:
        """Whether pruning left the answer as it was."""
        return self.dense == self.pruned


@dataclass(frozen=True)
class Figure:
    """All that the picture tells.

    Attributes:
        image: the image, as the model saw it where that can be told.
        selection: the tokens.
        title: method and its options.
        model: name of the model.
        answers: questions and answers.
        note: a sentence below everything, may be empty.
    """

    image: Image.Image
    selection: Selection
    title: str
    model: str
    answers: Sequence[Answer]
    note: str = ""


def draw(figure: Figure) -> Image.Image:
    """The overlay: the image, the kept tokens, and for each dropped token the kept one that is nearest to it."""
    selection = figure.selection
    rows, columns = selection.grid or strip(len(selection.nearest))
    size = _panel_size(figure.image.size if selection.grid else (1, 1))
    cells = cells_of(size, rows, columns)[: len(selection.nearest)]
    seen = fit(figure.image, size, stretch=selection.grid is not None)
    below = seen if selection.grid else Image.new("RGB", size, (120, 126, 142))
    panels = (seen, _kept_panel(below, cells, selection), _nearest_panel(below, cells, selection, columns))

    width = 3 * size[0] + 2 * GAP + 2 * MARGIN
    page = Image.new("RGB", (width, 4 * size[1] + 4000), BACKGROUND)
    pen = ImageDraw.Draw(page)
    n_tokens, n_kept = len(selection.nearest), len(selection.kept)
    stats = (
        (f"{n_tokens:,} -> {n_kept:,}", "visual tokens"),
        (f"{100 * n_kept / n_tokens:.1f} %", "kept"),
        (f"{selection.radius:.3f}", "coverage radius"),
    )
    y = header(pen, figure.title, figure.model, stats, width)
    edges = [MARGIN + number * (size[0] + GAP) for number in range(3)]
    captions = zip(edges, panels, _captions(selection), strict=True)
    y = max(_place(page, pen, x, y, *entry) for x, *entry in captions)
    y = table(pen, figure.answers, edges, size[0], y + 24)
    if figure.note:
        y += 12 + paragraph(pen, figure.note, (MARGIN, y + 12), width - 2 * MARGIN, 22, KEPT)
    return page.crop((0, 0, width, y + MARGIN))


def _place(
    page: Image.Image, pen: ImageDraw.ImageDraw, x: int, y: int, panel: Image.Image, caption: tuple[str, str]
) -> int:
    """A panel between its title and its caption; returns where it ends."""
    pen.text((x, y), caption[0], INK, font(26))
    page.paste(panel, (x, y + 42))
    y += 42 + panel.height + 14
    return y + paragraph(pen, caption[1], (x, y), panel.width, 20, MUTED)


def _captions(selection: Selection) -> list[tuple[str, str]]:
    n_tokens, n_kept = len(selection.nearest), len(selection.kept)
    where = "Bright: kept. Dim: dropped before the language model."
    tie = "Each dropped token has the colour of the kept token (outlined) most like it; the fainter, the less alike."
    if selection.grid is None:
        where += " This model's tokens are not one grid over the image: they stand here in their order, line by line."
        return [("The image", ""), ("Kept tokens, in order", where), ("Nearest kept token, in order", tie)]
    rows, columns = selection.grid
    seen = f"The model sees it as {rows} x {columns} tokens."
    return [("The image", seen), (f"Kept: {n_kept} of {n_tokens} tokens", where), ("Nearest kept token", tie)]


def strip(n_tokens: int) -> tuple[int, int]:
    """Rows and columns to lay out tokens that have no place in the image."""
    columns = math.isqrt(max(0, n_tokens - 1)) + 1
    return -(-n_tokens // columns), columns


def _panel_size(size: tuple[int, int]) -> tuple[int, int]:
    """Size of a panel for an image of this size; a small one grows by a whole factor: its pixels stay square."""
    longer = max(size)
    scale = round(PANEL / longer) if 16 <= longer <= PANEL // 3 else PANEL / longer
    width, height = (round(side * scale) for side in size)
    if width < LEAST_WIDTH:
        width, height = LEAST_WIDTH, min(round(height * LEAST_WIDTH / max(1, width)), 2 * PANEL)
    return width, max(height, PANEL // 4)


def fit(image: Image.Image, size: tuple[int, int], *, stretch: bool) -> Image.Image:
    """The image at the size of a panel, or as large as fits into it."""
    smooth = Image.Resampling.NEAREST if max(image.size) <= PANEL // 3 else Image.Resampling.LANCZOS
    if stretch:
        return image.resize(size, smooth)
    scale = min(size[0] / image.width, size[1] / image.height)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), smooth)
    panel = Image.new("RGB", size, CARD)
    panel.paste(small, ((size[0] - small.width) // 2, (size[1] - small.height) // 2))
    return panel


def cells_of(size: tuple[int, int], rows: int, columns: int) -> list[Box]:
    """Boxes of the tokens, line by line; right and bottom are exclusive."""
    xs = [round(i * size[0] / columns) for i in range(columns + 1)]
    ys = [round(i * size[1] / rows) for i in range(rows + 1)]
    return [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns)]


def outline(pen: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    left, top, right, bottom = box
    width = max(1, min(3, min(right - left, bottom - top) // 12))
    if right - left > 2 and bottom - top > 2:
        pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=width)


def _kept_panel(image: Image.Image, cells: Sequence[Box], selection: Selection) -> Image.Image:
    """Kept cells as they are, all else dim and nearly grey."""
    dim = ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(0.3)).enhance(0.4)
    panel = dim.copy()
    pen = ImageDraw.Draw(panel)
    for token in selection.kept:
        panel.paste(image.crop(cells[token]), cells[token])
        outline(pen, cells[token], KEPT)
    return panel


def hues(kept: Sequence[int]) -> dict[int, Colour]:
    """A colour for each kept token; steps by the golden angle set neighbours far apart."""
    colours: dict[int, Colour] = {}
    for order, token in enumerate(kept):
        lightness, saturation = ((0.62, 0.85), (0.52, 0.70), (0.74, 0.75))[order % 3]
        red, green, blue = colorsys.hls_to_rgb((order * 0.618034) % 1.0, lightness, saturation)
        colours[token] = (round(255 * red), round(255 * green), round(255 * blue))
    return colours


def _nearest_panel(image: Image.Image, cells: Sequence[Box], selection: Selection, columns: int) -> Image.Image:
    """Cells in the colour of their nearest kept token over a faint image, with borders between different ones."""
    base = ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(0.0)).enhance(0.9).convert("RGBA")
    colours, farthest = hues(selection.kept), max(selection.radius, 1e-6)
    tint = Image.new("RGBA", base.size)
    pen = ImageDraw.Draw(tint)
    for box, owner, distance in zip(cells, selection.nearest, selection.distance, strict=True):
        alpha = round(225 - 125 * distance / farthest)
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(*colours[owner], alpha))
    panel = Image.alpha_composite(base, tint).convert("RGB")
    pen = ImageDraw.Draw(panel)
    for token, (left, top, right, bottom) in enumerate(cells):
        owner, beside, below = selection.nearest[token], token + 1, token + columns
        if beside % columns and beside < len(cells) and selection.nearest[beside] != owner:
            pen.line((right, top, right, bottom), BACKGROUND, 1)
        if below < len(cells) and selection.nearest[below] != owner:
            pen.line((left, bottom, right, bottom), BACKGROUND, 1)
    if len(cells) - len(selection.kept) <= MOST_LINKS:
        panel = _linked(panel, cells, selection)
    pen = ImageDraw.Draw(panel)
    for token in selection.kept:
        left, top, right, bottom = cells[token]
        pen.rectangle((left, top, right - 1, bottom - 1), fill=colours[token])
        outline(pen, cells[token], (255, 255, 255))
    return panel


def _linked(panel: Image.Image, cells: Sequence[Box], selection: Selection) -> Image.Image:
    """A thin line from each dropped token to its kept one; drawn at twice the size for smooth edges."""
    veil = Image.new("L", (2 * panel.width, 2 * panel.height))
    pen = ImageDraw.Draw(veil)
    middles = [(left + right, top + bottom) for left, top, right, bottom in cells]
    for token, owner in enumerate(selection.nearest):
        if token != owner:
            x, y = middles[token]
            pen.line((x, y, *middles[owner]), 85, 2)
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), 150)
    return Image.composite(Image.new("RGB", panel.size, "white"), panel, veil.reduce(2))


def header(pen: ImageDraw.ImageDraw, title: str, model: str, stats: Sequence[tuple[str, str]], width: int) -> int:
    """The title strip, with figures and what they count on its right; returns where it ends."""
    x = width - MARGIN
    for value, label in reversed(stats):
        block = max(font(34).getlength(value), font(20).getlength(label))
        x -= math.ceil(block)
        pen.text((x, 30), value, INK, font(34))
        pen.text((x, 74), label, MUTED, font(20))
        x -= 44
    room = x - MARGIN
    pen.text((MARGIN, 30), lines(title, room, 34, most=1)[0], KEPT, font(34))
    pen.text((MARGIN, 74), lines(model, room, 20, most=1)[0], MUTED, font(20))
    pen.line((MARGIN, 116, width - MARGIN, 116), RULE, 2)
    return 136


def table(pen: ImageDraw.ImageDraw, answers: Sequence[Answer], edges: Sequence[int], column: int, y: int) -> int:
    """Questions and answers in columns below the panels; returns where the table ends."""
    end = edges[2] + column
    for x, label in zip(edges, ("question", "answer with all tokens", "answer with the kept tokens"), strict=True):
        pen.text((x, y), label, MUTED, font(20))
    y += 34
    for answer in answers:
        pen.line((MARGIN, y, end, y), RULE, 1)
        y += 10
        verdict, colour = ("same", SAME) if answer.same else ("different", DIFFERENT)
        pen.text((end - font(24).getlength(verdict), y), verdict, colour, font(24))
        texts, rooms = (answer.question, answer.dense, answer.pruned), (column, column, column - VERDICT)
        parts = zip(texts, edges, rooms, strict=True)
        y += max(paragraph(pen, text, (x, y), room, 24, INK) for text, x, room in parts) + 8
    return y
