"""What a comparison of several methods found, as data, as a table and as a plot."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenprune.report.tables import Document, Part, Table, number, percent, settings

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
        keep: what was asked for; 1 for the dense model; None for methods whose own options say how much is kept.
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

    def cells(self) -> dict[str, str]:
        """The row of a table, by the names of its columns."""
        return {
            "method": self.method,
            "keep": "-" if self.keep is None else f"{self.keep:g}",
            "tokens": f"{self.visual_tokens:,.5g}",
            "cost": percent(self.prefill_share, 0),
            "agree": percent(self.agreement, 0),
            "same": percent(self.same_answers, 0),
            "right": percent(self.accuracy, 0),
            "KL": number(self.first_token_kl),
            "1st ms": number(self.first_token_latency_ms[0]),
            "next ms": "-" if self.decode_latency_ms is None else number(self.decode_latency_ms[0]),
            "all ms": number(self.total_latency_ms[0]),
            "KV MiB": number(self.kv_mib),
            "peak": number(self.peak_mib),
        }


@dataclass(frozen=True)
class Comparison(Document):
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

    def parts(self) -> Iterator[Part]:
        """The sentences and the table, in the order in which they are read."""
        yield f"{self.model}: {len(self.questions)} question(s), {settings(self.setting)}"
        cells = [row.cells() for row in self.rows]
        columns = [name for name in cells[0] if self.expected or name != "right"]
        yield Table(columns, [[row[name] for name in columns] for row in cells])
        yield LEGEND
        yield from (f"{note}." for note in self.notes)

    def plot(self, path: str | Path) -> None:
        """Draw agreement (accuracy, where answers were expected), latency and KV memory against the tokens that the
        decoder's layers see.

        Raises:
            OptionError: matplotlib is not installed, or the file cannot be written.
        """
        from tokenprune.report.plots import plot_lines

        panels: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            values = {
                "tokens equal to the dense answer, %": None if self.expected else 100 * row.agreement,
                "right answers, %": None if row.accuracy is None else 100 * row.accuracy,
                "time to the first token, ms": row.first_token_latency_ms[0],
                "KV cache, MiB": row.kv_mib,
            }
            for label, height in values.items():
                if height is not None:
                    panels[label][row.method].append((row.visual_tokens, height))
        plot_lines(path, title=self.model, panels=panels, xlabel="visual tokens, mean over the layers")
