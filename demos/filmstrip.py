"""Draw what happened to the visual tokens of a video: an animation and a contact sheet. Pillow only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lasting import Lasting, lasting_panel, legend
from lettering import font, paragraph
from overlay import BACKGROUND, GAP, INK, KEPT, MARGIN, MUTED, RULE, Answer, fit, header, table
from PIL import Image, ImageDraw

PANEL = (560, 460)  # most that a panel of the animation may take
THUMB = (236, 236)
COLUMNS = 6
MOST_THUMBS = 48
BARS = 72  # height of the chart below the panels


@dataclass(frozen=True)
class Film:
    """All that the pictures tell.

    Attributes:
        frames: as the model saw them where that can be told.
        seconds: their times.
        tokens: how long the tokens of each frame lasted; several frames may share one entry's tokens.
        n_tokens: visual tokens of the video.
        n_kept: of them those that are there after the first stage.
        title: method and its options.
        model: name of the model.
        answers: questions and answers.
        note: a sentence below everything, may be empty.
    """

    frames: Sequence[Image.Image]
    seconds: Sequence[float]
    tokens: Sequence[Lasting]
    n_tokens: int
    n_kept: int
    title: str
    model: str
    answers: Sequence[Answer]
    note: str = ""

    @property
    def stats(self) -> tuple[tuple[str, str], ...]:
        """Figures for the title strip."""
        share = f"{100 * self.n_kept / max(1, self.n_tokens):.1f} %"
        return ((f"{self.n_tokens:,} -> {self.n_kept:,}", "visual tokens"), (share, "kept"))


def _inside(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """The largest size of these proportions that fits into `room`, in even numbers."""
    scale = min(room[0] / size[0], room[1] / size[1])
    width, height = (max(48, 2 * round(side * scale / 2)) for side in size)
    return min(width, room[0]), min(height, room[1])


def animate(film: Film) -> Iterator[Image.Image]:
    """One page for each frame: the frame, its tokens, and where in the video it stands."""
    size = _inside(film.frames[0].size, PANEL)
    width = max(2 * size[0] + GAP, 960) + 2 * MARGIN
    gap = width - 2 * MARGIN - 2 * size[0]
    page = Image.new("RGB", (width, 136 + 36 + size[1] + 48 + BARS + 40 + MARGIN), BACKGROUND)
    top = header(ImageDraw.Draw(page), film.title, film.model, film.stats, width) + 36
    right = MARGIN + size[0] + gap
    foot = top + size[1] + 14
    legend(ImageDraw.Draw(page), (right, foot, right + size[0], foot + 26), film.tokens[0].stages)
    for number, (frame, second, shown) in enumerate(zip(film.frames, film.seconds, film.tokens, strict=True)):
        fresh = page.copy()
        pen = ImageDraw.Draw(fresh)
        pen.text((MARGIN, top - 34), f"frame {number + 1} of {len(film.frames)}, {second:.2f} s", INK, font(22))
        pen.text((right, top - 34), f"{shown.n_kept} of {len(shown.depth)} tokens go on", INK, font(22))
        fresh.paste(fit(frame, size, stretch=True), (MARGIN, top))
        fresh.paste(lasting_panel(frame, size, shown), (right, top))
        _chart(pen, film, number, (MARGIN, foot + 40, width - MARGIN, foot + 40 + BARS))
        yield fresh


def _chart(pen: ImageDraw.ImageDraw, film: Film, current: int, box: tuple[int, int, int, int]) -> None:
    """A bar for each frame, as high as the tokens of it that go on."""
    left, top, right, bottom = box
    most = max(1, *(shown.n_kept for shown in film.tokens))
    label = f"tokens that go on, frame by frame (at most {most})"
    pen.text((left, top), label, MUTED, font(18))
    base, height, step = bottom, bottom - top - 30, (right - left) / len(film.tokens)
    pen.line((left, base, right, base), RULE, 2)
    for number, shown in enumerate(film.tokens):
        near, far = left + round(number * step), left + round((number + 1) * step) - (2 if step > 5 else 0)
        ink = KEPT if number == current else (92, 100, 124) if number < current else (58, 65, 84)
        high = max(2, round(height * shown.n_kept / most))
        pen.rectangle((near, base - high, max(near, far - 1), base - 1), fill=ink)


def contact_sheet(film: Film) -> Image.Image:
    """All frames (evenly spaced ones of very many) with their tokens, and what was asked and answered."""
    n_frames = len(film.frames)
    n_shown = min(n_frames, MOST_THUMBS)
    chosen = [(2 * place + 1) * n_frames // (2 * n_shown) for place in range(n_shown)]
    columns = max(4, -(-n_shown // -(-n_shown // COLUMNS)))
    size, gap = _inside(film.frames[0].size, THUMB), 16
    wide = columns * (THUMB[0] + gap) - gap
    width = wide + 2 * MARGIN
    rows = -(-n_shown // columns)
    page = Image.new("RGB", (width, 136 + rows * (size[1] + 44) + 600 + 400 * len(film.answers)), BACKGROUND)
    pen = ImageDraw.Draw(page)
    y = header(pen, film.title, film.model, film.stats, width)
    legend(pen, (MARGIN, y - 6, MARGIN + min(wide, 560), y + 20), film.tokens[0].stages)
    y += 34
    for place, number in enumerate(chosen):
        left = MARGIN + place % columns * (THUMB[0] + gap)
        top = y + place // columns * (size[1] + 44)
        shown = film.tokens[number]
        page.paste(lasting_panel(film.frames[number], size, shown), (left, top))
        pen.text((left, top + size[1] + 6), f"{film.seconds[number]:.2f} s", INK, font(18))
        count = f"{shown.n_kept} of {len(shown.depth)}"
        pen.text((left + size[0], top + size[1] + 6), count, MUTED, font(18), anchor="ra")
    y += rows * (size[1] + 44) + 8
    column = (wide - 2 * GAP) // 3
    y = table(pen, film.answers, [MARGIN + place * (column + GAP) for place in range(3)], column, y)
    if film.note:
        y += 12 + paragraph(pen, film.note, (MARGIN, y + 12), wide, 20, KEPT)
    return page.crop((0, 0, width, y + MARGIN))
