"""Plain tables in three forms, from one list of rows. The first column is a name, the others are numbers."""

import html
import math
from collections.abc import Callable, Mapping
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]
"""Makes a table out of a header and rows of cells."""


def number(value: float | None) -> str:
    """Three or four digits of `value`, "-" for what is not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def plain(value: Any) -> Any:
    """`value` as lists, dictionaries and numbers that JSON has; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned with blanks."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    cells = [
        [
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (header, *rows)
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rule = [":--" if place == 0 else "--:" for place in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *rows)
    )


def as_html(header: list[str], rows: list[list[str]]) -> str:
    """An HTML table."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
