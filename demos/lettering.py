"""Text in a picture: broken into lines, in the characters that Pillow's own font has."""

import unicodedata

from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, `size` pixels high."""
    return ImageFont.load_default(size)


def _plain(text: str) -> str:
    """The text in the characters that Pillow's own font has."""
    flat = " ".join(unicodedata.normalize("NFKD", text).split())
    return "".join(c if " " <= c <= "~" else "?" for c in flat if not unicodedata.combining(c))


def lines(text: str, room: float, size: int, *, most: int = 6) -> list[str]:
    """Break a text into lines no wider than `room`; what is beyond `most` lines ends in three dots."""
    face, found = font(size), [""]
    for word in _plain(text).split():
        while word:
            line = f"{found[-1]} {word}".strip()
            if face.getlength(line) <= room:
                found[-1], word = line, ""
            elif found[-1]:
                found.append("")
            else:  # a word wider than a line
                n_fit = max(1, sum(face.getlength(word[: n + 1]) <= room for n in range(len(word))))
                found[-1], word = word[:n_fit], word[n_fit:]
                found += [""] if word else []
    if len(found) > most:
        last = found[most - 1]
        while last and face.getlength(last + "...") > room:
            last = last[:-1]
        found = [*found[: most - 1], last + "..."]
    return found


def paragraph(pen: ImageDraw.ImageDraw, text: str, at: tuple[int, int], room: int, size: int, ink: Colour) -> int:
    """Write a text in lines; returns its height."""
    found, step = lines(text, room, size), round(size * 1.35)
    for number, line in enumerate(found):
        pen.text((at[0], at[1] + number * step), line, ink, font(size))
    return len(found) * step
