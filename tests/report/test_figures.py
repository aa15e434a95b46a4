"""Plots: what is drawn is what was measured, no text runs into another one, and mistakes get a sentence."""

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tokenprune.errors import OptionError
from tokenprune.report.costs import Cost
from tokenprune.report.plots import SHOWN, plot_lines, plot_report
from tokenprune.report.report import Report
from tokenprune.report.site_tables import LayerReport

LAYERS = tuple(LayerReport(i, 600, 600, 648, 220 - 6 * i, 1.0, 0.4) for i in range(28))
COSTS = tuple(
    Cost(name, 120.0 * i + 0.5, 37.5 * i, (110.0 * i, 130.0 * i + 0.5), (37.0 * i, 60.0 * i))
    for i, name in enumerate(reversed(SHOWN))
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    write = Figure.savefig

    def note(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        write(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", note)
    return figures


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of the figure whose boxes meet, and texts that leave it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    page = figure.bbox
    beyond = [(text, "page") for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > page.x1 or box.y1 > page.y1]
    return beyond + [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.overlaps(two)]


def test_a_report_is_drawn_with_its_figures(drawn: list[Figure], tmp_path: Path) -> None:
    Report("Llava", ("DivPrune(keep=0.25)",), (), {}, COSTS, None, LAYERS).plot(tmp_path / "report.png")
    (figure,) = drawn
    left, right = figure.axes
    steps = [patch.get_data().values.tolist() for patch in left.patches]
    assert steps[0] == [648] * 28
    assert steps[-1] == [layer.pruned_tokens for layer in LAYERS]
    widths = sorted(patch.get_width() for patch in right.patches)
    assert widths == sorted([cost.dense for cost in COSTS] + [cost.pruned for cost in COSTS])
    assert [label.get_text() for label in right.get_yticklabels()] == list(SHOWN.values())
    assert overlapping(figure) == []
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_without_layers_the_latencies_are_drawn_alone(drawn: list[Figure], tmp_path: Path) -> None:
    plot_report(tmp_path / "report.svg", title="x" * 200, layers=(), costs=COSTS[:3])
    assert len(drawn[0].axes) == 1
    assert overlapping(drawn[0]) == []


def test_lines_share_a_legend(drawn: list[Figure], tmp_path: Path) -> None:
    lines = {name: [(0.5, 3.0), (0.1, 1.0 + i), (0.25, 2.0)] for i, name in enumerate("abcdefgh")}
    plot_lines(
        tmp_path / "lines.png", title="title", panels={"one": lines, "two": lines, "three": lines}, xlabel="keep"
    )
    assert [line.get_xdata().tolist() for line in drawn[0].axes[0].lines] == [[0.1, 0.25, 0.5]] * 8
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == list("abcdefgh")
    assert overlapping(drawn[0]) == []


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nothing was measured.*call report\(inputs\)"):
        Report("Llava", (), ()).plot(tmp_path / "report.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["report.doc", "report", ""])
def test_an_ending_that_is_no_image_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"ends in \..*png"):
        plot_report(tmp_path / name, title="", layers=LAYERS, costs=COSTS)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot be written to .*there is no folder"):
        plot_report(tmp_path / "nowhere" / "report.png", title="", layers=LAYERS, costs=COSTS)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.png").mkdir()
    with pytest.raises(OptionError, match=r"cannot be written to .*Is a directory"):
        plot_report(tmp_path / "report.png", title="", layers=LAYERS, costs=COSTS)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(OptionError, match="pip install"):
        plot_report(tmp_path / "report.png", title="", layers=LAYERS, costs=COSTS)
