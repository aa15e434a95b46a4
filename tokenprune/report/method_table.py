"""What a comparison of several methods found, as data, as a table and as a plot."""

import dataclasses
import html
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenprune.report.tables import Table, as_html, as_markdown, as_text, number, plain

HEADER = [
    "method",
    "keep",
    "tokens",
    "cost",
    "agree",
    "same",
    "right",
    "KL",
    "1st ms",
    "next ms",
    "all ms",
    "KV MiB",
    "peak",
]
NAME_WIDTH = 24
LEGEND = (
    "tokens: visual ones, mean over the decoder's layers; cost: arithmetic of the decoder over the prompt, choosing "
    "included, against the dense model's (compare rows that cost alike); agree: greedy tokens equal to the dense "
    "answer's before the first difference; same: answers that are the same; right: answers as expected; KL: of the "
    "first token, in nats; 1st ms: to the first token; next ms: each further token; all ms: end to end; peak: MiB "
    "beyond weights and inputs. Latencies are medians of runs in turn."
)


@dataclass(frozen=True)
class Row:
    """What one candidate did; latency, memory and arithmetic are of the first question.

    Attributes:
        method: its name, or "dense" or "resize".
        keep: what was asked for; 1 for the dense model; None for methods that set themselves how much is left.
        visual_tokens: visual tokens in the decoder at the prefill of the first question, mean over its layers: what
            makes methods that prune at different depths comparable.
        prefill_share: arithmetic of the decoder over the prompt of the first question, with choosing, as a share of the
            dense model's; None if the model shows no decoder.
        agreement: part of the dense answers' tokens that came before the first difference, mean over the questions.
        same_answers: part of the answers that are the same as text.
        accuracy: part of the answers that are as expected; None if nothing was expected.
        first_token_kl: KL divergence of the first token's distribution, dense from this, mean, in nats.
        first_token_latency_ms: median, 20 % and 80 % quantile.
        decode_latency_ms: of each further token, likewise; None if only one was generated.
        total_latency_ms: end to end, likewise.
        kv_mib: KV cache after the last token.
        peak_mib: peak memory beyond weights and inputs.
        total_flops_g: arithmetic of the whole generation.
        answers: the answers.
    """

    method: str
    keep: float | None
    visual_tokens: float
    prefill_share: float | None
    agreement: float
    same_answers: float
    accuracy: float | None
    first_token_kl: float
    first_token_latency_ms: tuple[float, float, float]
    decode_latency_ms: tuple[float, float, float] | None
    total_latency_ms: tuple[float, float, float]
    kv_mib: float | None
    peak_mib: float
    total_flops_g: float
    answers: tuple[str, ...]

    def cells(self) -> list[str]:
        """The row of a table."""
        shares = ["-" if part is None else f"{100 * part:.0f} %" for part in self._shares()]
        times = [self.first_token_latency_ms, self.decode_latency_ms, self.total_latency_ms]
        latencies = ["-" if time is None else number(time[0]) for time in times]
        memory = [number(self.kv_mib), number(self.peak_mib)]
        keep = "-" if self.keep is None else f"{self.keep:g}"
        tokens = f"{self.visual_tokens:,.5g}"
        return [self.method, keep, tokens, *shares, number(self.first_token_kl), *latencies, *memory]

    def _shares(self) -> tuple[float | None, ...]:
        return self.prefill_share, self.agreement, self.same_answers, self.accuracy


def _narrow(header: list[str], rows: list[list[str]]) -> str:
    """A table as text in which long names go on in the lines below."""
    lines: list[list[str]] = []
    for name, *cells in rows:
        first, *others = textwrap.wrap(name.replace(",", ", "), NAME_WIDTH, subsequent_indent="  ")
        lines += [[first, *cells], *([other, *[""] * len(cells)] for other in others)]
    return as_text(header, lines)


@dataclass(frozen=True)
class Comparison:
    """What :func:`tokenprune.report.compare.compare` returns; print it, or show it in a notebook.

    Attributes:
        model: name, class, device and dtype.
        questions: what was asked.
        expected: right answers; empty if none were given.
        rows: the dense model first.
        notes: why a candidate is missing.
        setting: how it was measured.
    """

    model: str
    questions: tuple[str, ...]
    expected: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    setting: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data; numbers that are not finite become None."""
        result: dict[str, Any] = plain(dataclasses.asdict(self))
        return result

    def to_json(self, *, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_markdown(self) -> str:
        """The comparison as Markdown."""
        return "\n\n".join(self._parts(as_markdown, str))

    def __str__(self) -> str:
        """The comparison as text."""
        return "\n\n".join(self._parts(_narrow, lambda line: textwrap.fill(line, 100, subsequent_indent="  ")))

    def _repr_html_(self) -> str:
        return "\n".join(self._parts(as_html, lambda line: f"<p>{html.escape(line)}</p>"))

    def _parts(self, table: Table, line: Callable[[str], str]) -> list[str]:
        setting = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.setting.items())
        parts = [line(f"{self.model}: {len(self.questions)} question(s), {setting}")]
        lines = [HEADER, *(row.cells() for row in self.rows)]
        if not self.expected:
            lines = [[cell for cell, name in zip(cells, HEADER, strict=True) if name != "right"] for cells in lines]
        parts.append(table(lines[0], lines[1:]))
        return parts + [line(LEGEND)] + [line(f"{note}.") for note in self.notes]

    def plot(self, path: str | Path) -> None:
        """Draw agreement (accuracy, where answers were expected), latency and KV memory against the tokens that the
        decoder's layers see.

        Raises:
            OptionError: matplotlib is not installed, or the file cannot be written.
        """
        from tokenprune.report.plots import plot_lines

        def lines(value: Callable[[Row], float | None]) -> dict[str, list[tuple[float, float]]]:
            found: dict[str, list[tuple[float, float]]] = {}
            for row in self.rows:
                if (height := value(row)) is not None:
                    found.setdefault(row.method, []).append((row.visual_tokens, height))
            return found

        quality: dict[str, Callable[[Row], float | None]] = {
            "tokens equal to the dense answer, %": lambda row: 100 * row.agreement
        }
        if self.expected:
            quality = {"right answers, %": lambda row: None if row.accuracy is None else 100 * row.accuracy}
        panels = {
            **{label: lines(value) for label, value in quality.items()},
            "time to the first token, ms": lines(lambda row: row.first_token_latency_ms[0]),
            "KV cache, MiB": lines(lambda row: row.kv_mib),
        }
        panels = {label: found for label, found in panels.items() if found}
        plot_lines(path, title=self.model, panels=panels, xlabel="visual tokens, mean over the layers")
