"""What a report is made of, sentences and tables, and each of the forms in which it is given: text, Markdown, HTML, and
plain data."""

import dataclasses
import html
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXT_WIDTH, NAME_WIDTH = 100, 26


@dataclass(frozen=True)
class Table:
    """Rows of cells below a header. The first column holds names, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Part = str | Table
"""A sentence or a table."""


@dataclass(frozen=True)
class Document:
    """Data with sentences and tables about it; print it, or show it in a notebook."""

    def parts(self) -> Iterable[Part]:
        """The sentences and tables, in the order in which they are read."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data: lists, dictionaries, strings, numbers; numbers that are not finite become None."""
        result: dict[str, Any] = plain(dataclasses.asdict(self))
        return result

    def to_json(self, *, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_markdown(self) -> str:
        """The document as Markdown."""
        return "\n\n".join(map(as_markdown, self.parts()))

    def __str__(self) -> str:
        """The document as text; its sentences have at most 100 columns."""
        return "\n\n".join(map(as_text, self.parts()))

    def _repr_html_(self) -> str:
        return "\n".join(map(as_html, self.parts()))


def as_text(part: Part) -> str:
    """A wrapped sentence, or columns aligned with blanks; a long name is continued in the lines below."""
    if isinstance(part, str):
        return textwrap.fill(part, TEXT_WIDTH, subsequent_indent="  ")
    lines = [list(part.header)]
    for name, *cells in part.rows:
        first, *others = textwrap.wrap(name.replace(",", ", "), NAME_WIDTH, subsequent_indent="  ")
        lines += [[first, *cells], *([other, *[""] * len(cells)] for other in others)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def as_markdown(part: Part) -> str:
    """The sentence, or a Markdown table."""
    if isinstance(part, str):
        return part
    rule = [":--", *["--:"] * (len(part.header) - 1)]
    lines = ([cell.replace("|", "\\|") for cell in row] for row in (part.header, rule, *part.rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_html(part: Part) -> str:
    """An HTML paragraph or table."""
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in part.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def number(value: float | None) -> str:
    """Three or four digits of `value`, "-" for what is not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, "-" for none."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def factor(before: float, after: float) -> str:
    """How many times less `after` is than `before`, "-" where one of them is nothing."""
    return f"{before / after:.2f}x" if before and after else "-"


def settings(setting: Mapping[str, Any]) -> str:
    """How something was measured, in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())


def plain(value: Any) -> Any:
    """`value` as lists, dictionaries and numbers that JSON has; numbers that are not finite become None."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
