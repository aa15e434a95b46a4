"""Pictures of reports and comparisons, drawn by matplotlib where it is installed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tokenprune.errors import OptionError
from tokenprune.report.costs import Cost
from tokenprune.report.site_tables import LayerReport
from tokenprune.report.tables import number

DENSE, PRUNED = "#8a8f98", "#c2410c"
LINES = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#374151")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHOWN = {
    "total_latency_ms": "end to end",
    "decode_latency_ms": "each further token",
    "first_token_latency_ms": "to the first token",
    "prefill_latency_ms": "decoder, prompt",
    "selection_latency_ms": "selection",
    "encoder_latency_ms": "encoder",
}


def plot_report(path: str | Path, *, title: str, layers: Sequence[LayerReport], costs: Sequence[Cost]) -> None:
    """Draw the sequence length at each layer of the decoder, and the latencies with their spread.

    Args:
        path: an image file; its ending says which kind.
        title: of the picture.
        layers: the decoder's layers, measured.
        costs: dense against pruned; those named in `SHOWN` are drawn.

    Raises:
        OptionError: there is nothing to draw, matplotlib is not installed, or the file cannot be written.
    """
    timed = [cost for name in SHOWN for cost in costs if cost.name == name]
    if not timed:
        raise OptionError(
            "nothing was measured, so there is nothing to plot; call report(inputs) for a measured report"
        )
    drawn = [layer for layer in layers if layer.dense_tokens is not None and layer.pruned_tokens is not None]

    with _figure(path, title=title, size=(11, 4.6)) as figure:
        panels = figure.subplots(1, 2 if drawn else 1, squeeze=False, width_ratios=[2, 3] if drawn else None)[0]
        if drawn:
            _draw_layers(panels[0], drawn)
        _draw_latencies(panels[-1], timed)
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def _draw_layers(axes: Any, layers: Sequence[LayerReport]) -> None:
    edges = [layer.layer - 0.5 for layer in layers] + [layers[-1].layer + 0.5]
    axes.stairs([layer.dense_tokens for layer in layers], edges, fill=True, color=DENSE, alpha=0.35)
    axes.stairs([layer.dense_tokens for layer in layers], edges, color=DENSE, linewidth=1.5)
    axes.stairs([layer.pruned_tokens for layer in layers], edges, fill=True, color=PRUNED)
    axes.set(xlabel="layer of the decoder", ylabel="tokens, text included", title="Sequence at the prefill")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain(axes)


def _draw_latencies(axes: Any, costs: Sequence[Cost]) -> None:
    whiskers = {"elinewidth": 1, "capsize": 2, "ecolor": "#111827"}
    for shift, colour, side in ((0.2, DENSE, "dense"), (-0.2, PRUNED, "pruned")):
        values = [getattr(cost, side) for cost in costs]
        ranges = [getattr(cost, f"{side}_range") or (value, value) for cost, value in zip(costs, values, strict=True)]
        reach = np.abs(np.array(ranges).T - values)
        places = np.arange(len(costs)) + shift
        bars = axes.barh(places, values, height=0.38, color=colour, label=side, xerr=reach, error_kw=whiskers)
        axes.bar_label(bars, map(number, values), padding=4, fontsize=8)
    axes.set_yticks(range(len(costs)), [SHOWN[cost.name] for cost in costs])
    axes.margins(x=0.14)
    axes.set(xlabel="ms, median; lines from 20 % to 80 % of the runs", title="Latency")
    _plain(axes)


def plot_lines(
    path: str | Path, *, title: str, panels: Mapping[str, Mapping[str, list[tuple[float, float]]]], xlabel: str
) -> None:
    """Draw a panel for each quantity, in it a line of points (x, y) for each name; the names share one legend.

    Raises:
        OptionError: matplotlib is not installed, or the file cannot be written.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))

    shown: dict[str, Any] = {}
    with _figure(path, title=title, size=(4.2 * len(panels), 4.4)) as figure:
        for axes, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for name, points in lines.items():
                style = names.index(name) % len(LINES)
                xs, ys = zip(*sorted(points), strict=True)
                look = {"color": LINES[style], "marker": MARKS[style], "markersize": 5, "linewidth": 1.5}
                (shown[name],) = axes.plot(xs, ys, clip_on=False, **look)
            axes.set(title=label, xlabel=xlabel)
            axes.set_ylim(bottom=0)
            _plain(axes)
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(len(shown), 8), frameon=False)


@contextmanager
def _figure(path: str | Path, *, title: str, size: tuple[float, float]) -> Iterator[Any]:
    """A figure of so many inches, written to `path` after the block; no state of matplotlib is touched.

    Raises:
        OptionError: matplotlib is not installed, or the file cannot be written.
    """
    check_target(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=150)
    figure.suptitle(title if len(title) <= 90 else f"{title[:87]}...", fontsize=11)
    yield figure
    try:
        figure.savefig(path)
    except OSError as error:
        raise OptionError(f"the plot cannot be written to {path}: {error.strerror or error}") from error


def check_target(path: str | Path) -> None:
    """Check that a plot can be written to `path`.

    Raises:
        OptionError: matplotlib is not installed, the ending is no image, or the folder is not there.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise OptionError('plotting needs matplotlib: pip install "tokenprune-vl[lab]", or matplotlib alone') from error
    path, known = Path(path), FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise OptionError(f"a plot is written to a file that ends in .{', .'.join(sorted(known))}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise OptionError(f"the plot cannot be written to {path}: there is no folder {path.parent}")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)
