"""One picture of all methods side by side: what each keeps, what it answers, what it costs. Pillow only."""

from collections.abc import Sequence
from dataclasses import dataclass

from lasting import EARLY, Lasting, lasting_panel
from lettering import Colour, font, lines, paragraph
from overlay import BACKGROUND, CARD, DIFFERENT, INK, KEPT, MARGIN, MUTED, RULE, SAME, cells_of, header
from PIL import Image, ImageDraw

COLUMNS = 5
WIDTH = 312  # of a card, its padding included
PADDING, GAP = 16, 20
TALLEST = 380  # of a panel
ANSWER_LINES = 4


@dataclass(frozen=True)
class Card:
    """One method.

    Attributes:
        title: its name.
        options: how it is set, may be empty.
        image: the image as the model sees it under this method.
        tokens: how long its tokens last; None for the dense model and for a smaller image.
        grid: rows and columns of tokens where `tokens` is None, for lines between them; None: no lines.
        figures: lines about what it costs.
        answers: one for each question.
        same: whether each is the dense model's answer; empty for the dense model.
    """

    title: str
    options: str
    image: Image.Image
    tokens: Lasting | None
    grid: tuple[int, int] | None
    figures: Sequence[str]
    answers: Sequence[str]
    same: Sequence[bool]


@dataclass(frozen=True)
class Sheet:
    """All that the picture tells: the cards, and what stands above and below them."""

    title: str
    model: str
    stats: Sequence[tuple[str, str]]
    questions: Sequence[str]
    cards: Sequence[Card]
    note: str = ""


def draw(sheet: Sheet) -> Image.Image:
    """The cards in rows, below the questions."""
    columns = min(COLUMNS, len(sheet.cards))
    columns = -(-len(sheet.cards) // -(-len(sheet.cards) // columns))  # rows as even as can be
    width = max(2, columns) * (WIDTH + GAP) - GAP + 2 * MARGIN
    rows = [sheet.cards[start : start + columns] for start in range(0, len(sheet.cards), columns)]
    room = TALLEST + 260 + 130 * len(sheet.questions)
    page = Image.new("RGB", (width, 400 + 120 * len(sheet.questions) + (room + GAP) * len(rows)), BACKGROUND)
    pen = ImageDraw.Draw(page)
    y = header(pen, sheet.title, sheet.model, sheet.stats, width)
    for number, question in enumerate(sheet.questions, 1):
        pen.text((MARGIN, y), f"{number}", KEPT, font(20))
        y += paragraph(pen, question, (MARGIN + 26, y), width - 2 * MARGIN - 26, 20, INK) + 2
    y = _legend(pen, y + 8, width) + 14
    for row in rows:
        tall = max(_height(card) for card in row)
        for place, card in enumerate(row):
            _draw_card(page, card, MARGIN + place * (WIDTH + GAP), y, tall)
        y += tall + GAP
    if sheet.note:
        y += paragraph(pen, sheet.note, (MARGIN, y), width - 2 * MARGIN, 20, KEPT) + 8
    return page.crop((0, 0, width, y + MARGIN - GAP))


def _legend(pen: ImageDraw.ImageDraw, y: int, width: int) -> int:
    """What the outlines mean; returns where it ends."""
    x = MARGIN
    parts: list[tuple[Colour, str]] = [
        (KEPT, "lasts longest"),
        (EARLY, "dropped inside the language model: the bluer, the sooner"),
        (MUTED, "dim: dropped first, or merged into another"),
    ]
    for colour, text in parts:
        length = round(font(18).getlength(text)) + 26
        if x > MARGIN and x + length > width - MARGIN:
            x, y = MARGIN, y + 28
        fill = (58, 65, 84) if colour == MUTED else None
        pen.rectangle((x, y + 3, x + 16, y + 19), fill=fill, outline=fill or colour, width=3)
        pen.text((x + 26, y), text, MUTED, font(18))
        x += length + 30
    return y + 28


def _panel_size(image: Image.Image) -> tuple[int, int]:
    width = WIDTH - 2 * PADDING
    return width, min(TALLEST, max(80, round(image.height * width / image.width)))


INDENT = 28  # of answers, for their numbers


def _texts(card: Card) -> list[tuple[str, int, Colour, int]]:
    """Text below the panel: text, size, colour and the most lines of it."""
    found = [(figure, 18, MUTED, 1) for figure in card.figures]
    for number, answer in enumerate(card.answers):
        colour = INK if not card.same else SAME if card.same[number] else DIFFERENT
        found.append((answer, 20, colour, ANSWER_LINES))
    return found


def _height(card: Card) -> int:
    room = WIDTH - 2 * PADDING
    text = sum(
        len(lines(text, room - INDENT, size, most=most)) * round(size * 1.35) for text, size, _, most in _texts(card)
    )
    return PADDING + 62 + _panel_size(card.image)[1] + 12 + text + 6 + PADDING


def _draw_card(page: Image.Image, card: Card, x: int, y: int, tall: int) -> None:
    pen, room = ImageDraw.Draw(page), WIDTH - 2 * PADDING
    pen.rounded_rectangle((x, y, x + WIDTH - 1, y + tall - 1), 10, fill=CARD, outline=RULE)
    x, y = x + PADDING, y + PADDING
    pen.text((x, y - 4), lines(card.title, room, 26, most=1)[0], KEPT if card.same else INK, font(26))
    pen.text((x, y + 30), lines(card.options, room, 17, most=1)[0], MUTED, font(17))
    y += 62
    size = _panel_size(card.image)
    if card.tokens is None:
        page.paste(_plain(card.image, size, card.grid), (x, y))
    else:
        page.paste(lasting_panel(card.image, size, card.tokens), (x, y))
    y += size[1] + 12
    for number, (text, height, colour, most) in enumerate(_texts(card), -len(card.figures)):
        inset = 0 if number < 0 else INDENT
        y += 6 if number == 0 else 0
        if inset:
            pen.text((x, y + 3), f"{number + 1}", MUTED, font(16))
        for line in lines(text, room - inset, height, most=most):
            pen.text((x + inset, y), line, colour, font(height))
            y += round(height * 1.35)


def _plain(image: Image.Image, size: tuple[int, int], grid: tuple[int, int] | None) -> Image.Image:
    """The image with thin lines between its tokens; what is small is shown in its pixels."""
    small = max(image.size) <= max(size) // 2
    panel = image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
    if grid is None:
        return panel
    veil = Image.new("L", size)
    pen = ImageDraw.Draw(veil)
    for left, top, right, bottom in cells_of(size, *grid):
        pen.rectangle((left, top, right, bottom), outline=70)
    return Image.composite(Image.new("RGB", size, KEPT), panel, veil)
