"""The plot of an evaluation: accuracy over the arithmetic of the decoder, overall and by type of question."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from intervals import OVERALL, WITHOUT_COUNT

BASELINES = {"random": "#8a8f98", "uniform": "#b08968", "resize": "#c9a227"}
COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#0e7490", "#be185d", "#374151", "#4d7c0f")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the plot of the rows that `evaluate.py` makes."""
    from matplotlib.figure import Figure

    kinds = list(rows[0]["accuracy"])
    kinds = [kind for kind in (OVERALL, WITHOUT_COUNT) if kind in kinds] + [
        kind for kind in kinds if kind not in (OVERALL, WITHOUT_COUNT)
    ]
    columns = min(len(kinds), 4 if len(kinds) > 6 else 3)
    lines = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(4.2 * columns + 0.4, 3.3 * lines + 1.1), layout="constrained", dpi=140)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))
    for axes, kind in zip(panels, kinds, strict=False):
        _panel(axes, rows, methods, kind)
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=9)
    figure.suptitle("Accuracy in % over the decoder's arithmetic in the prefill, % of dense (95 % intervals)")
    figure.savefig(path)


def _panel(axes: Any, rows: list[dict[str, Any]], methods: list[str], kind: str) -> None:
    dense = next((row["accuracy"][kind] for row in rows if row["method"] == "dense"), None)
    if dense is not None:
        axes.axhline(dense["mean"], color="black", linewidth=1, linestyle=":", label="dense")
    shares = _shares(rows)
    for number, method in enumerate(methods):
        found = sorted((row for row in rows if row["method"] == method), key=lambda row: shares[id(row)])
        cells = [row["accuracy"][kind] for row in found]
        across = [100 * shares[id(row)] for row in found]
        colour = BASELINES.get(method, COLOURS[number % len(COLOURS)])
        style = "--" if method in BASELINES else "-"
        mark = MARKS[number % len(MARKS)]
        means = [cell["mean"] for cell in cells]
        axes.plot(across, means, style, color=colour, marker=mark, markersize=4, linewidth=1.4, label=method)
        lows, highs = ([cell[end] for cell in cells] for end in ("low", "high"))
        axes.fill_between(across, lows, highs, color=colour, alpha=0.13, linewidth=0)
    axes.set_xscale("log")
    ticks = [5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_title(kind, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _shares(rows: list[dict[str, Any]]) -> dict[int, float]:
    """For each row what its decoder costs as a share of dense; `resize` is where the others are at its keep."""
    known = {row["keep"]: row["decoder_share"] for row in rows if "decoder_share" in row}
    return {id(row): row.get("decoder_share", known.get(row["keep"], row["keep"])) for row in rows}
