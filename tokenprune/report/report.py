"""What was pruned, why not, and what it cost: dense against pruned, measured in turn on the caller's own inputs."""

import dataclasses
import html
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tokenprune.errors import OptionError
from tokenprune.report.costs import (
    SHOWN_ROWS,
    BreakEven,
    Cost,
    Drift,
    amounts,
    break_even,
    break_even_sentences,
    drift,
    drift_sentences,
    latencies,
)
from tokenprune.report.generation import Generation, Inspection, inspect_generation, time_generation
from tokenprune.report.measure import rounds
from tokenprune.report.progress import progress
from tokenprune.report.site_tables import (
    BLOCK_HEADER,
    LAYER_HEADER,
    SITE_HEADER,
    LayerReport,
    SiteReport,
    block_rows,
    crowded,
    layer_rows,
    layers_of,
    site_rows,
    visual_tokens,
)
from tokenprune.report.tables import Table, as_html, as_markdown, as_text, number, plain
from tokenprune.report.traffic import TRAFFIC_HEADER, traffic_rows, traffic_sentence
from tokenprune.signals import Trace, Traffic
from tokenprune.upstream.generating import PROMPTS, end_ids, not_inputs, prompt_of

WIDTH = 100
SHOWN_LAYERS = 40


class SessionLike(Protocol):
    """What a report needs of a session."""

    @property
    def model(self) -> nn.Module:
        """The patched model."""

    @property
    def methods(self) -> Sequence[object]:
        """The methods in force."""

    @property
    def installed(self) -> bool:
        """Whether the methods are in force."""

    @property
    def traces(self) -> Sequence[Trace]:
        """What happened at the sites in the last forward with a prompt."""

    @property
    def traffic(self) -> Traffic | None:
        """Bytes of keys and values that the last generation read, where a method counts them."""

    def pause(self) -> AbstractContextManager[Any]:
        """Run dense inside the returned context."""


@dataclass(frozen=True)
class Report:
    """What :meth:`Session.report` returns; print it, or show it in a notebook.

    Attributes:
        model: class name of the model.
        methods: the methods with their options.
        sites: what happened at each site of the last forward with a prompt; empty if there was none.
        setting: how the costs were measured; empty if they were not.
        costs: dense against pruned.
        drift: None if nothing was measured.
        layers: the decoder's layers: tokens and KV memory; empty if nothing was measured and no site lies inside.
        break_even: an estimate of the number of visual tokens from which on pruning pays here, and which stage takes
            the dense time; None if nothing was measured or there was no visual token.
        traffic: bytes of keys and values that the last generation read, where a method counts them.
        remarks: what the methods could not do everywhere in this model, how many heads its blocks keep, and what could
            not be measured, with the reason.
    """

    model: str
    methods: tuple[str, ...]
    sites: tuple[SiteReport, ...]
    setting: dict[str, Any] = field(default_factory=dict)
    costs: tuple[Cost, ...] = ()
    drift: Drift | None = None
    layers: tuple[LayerReport, ...] = ()
    break_even: BreakEven | None = None
    traffic: Traffic | None = None
    remarks: tuple[str, ...] = ()

    def cost(self, name: str) -> Cost:
        """The cost of that name.

        Raises:
            OptionError: it was not measured.
        """
        for cost in self.costs:
            if cost.name == name:
                return cost
        names = ", ".join(cost.name for cost in self.costs) or "nothing: call report(inputs)"
        raise OptionError(f"{name!r} was not measured; measured: {names}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data: lists, dictionaries, strings, numbers; numbers that are not finite become None."""
        data = dataclasses.asdict(self)
        data["costs"] = [dict(dataclasses.asdict(cost), saved=cost.saved, factor=cost.factor) for cost in self.costs]
        if self.break_even is not None:
            data["break_even"]["dominant"] = self.break_even.dominant
        result: dict[str, Any] = plain(data)
        return result

    def to_json(self, *, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def plot(self, path: str | Path) -> None:
        """Draw tokens by layer and latencies, dense against pruned, to an image file of the kind its name says.

        Raises:
            OptionError: nothing was measured, matplotlib is not installed, or the file cannot be written.
        """
        from tokenprune.report.plots import plot_report

        plot_report(path, title=f"{self.model}: {' + '.join(self.methods)}", layers=self.layers, costs=self.costs)

    def to_markdown(self) -> str:
        """The report as Markdown."""
        return "\n\n".join(self._parts(as_markdown, lambda line: line))

    def __str__(self) -> str:
        """The report as text of at most 100 columns."""
        return "\n\n".join(self._parts(as_text, lambda line: textwrap.fill(line, WIDTH, subsequent_indent="  ")))

    def _repr_html_(self) -> str:
        return "\n".join(self._parts(as_html, lambda line: f"<p>{html.escape(line)}</p>"))

    def _parts(self, table: Table, line: Callable[[str], str]) -> list[str]:
        parts = [line(f"tokenprune: {self.model}, {' + '.join(self.methods)}"), *map(line, self.remarks)]
        if not self.sites and self.traffic is None:
            parts.append(line("No forward with a prompt has run through this session yet: there is nothing to report."))
            return parts
        parts += self._site_parts(table, line)
        if self.traffic is not None:
            parts += [table(TRAFFIC_HEADER, traffic_rows(self.traffic)), line(traffic_sentence(self.traffic))]
        if self.costs:
            setting = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.setting.items())
            parts.append(line(f"Dense against pruned, in turn; median (20 % - 80 % of the runs). {setting}."))
            parts.append(table(["", "dense", "pruned", "saved", "factor"], [_cost_row(cost) for cost in self.costs]))
        return parts + [
            line(sentence) for sentence in drift_sentences(self.drift) + break_even_sentences(self.break_even)
        ]

    def _site_parts(self, table: Table, line: Callable[[str], str]) -> list[str]:
        parts, grouped = [], crowded(self.sites)
        rows = [row for site in self.sites if site.site not in grouped for row in site_rows(site)]
        if rows:
            parts.append(table(SITE_HEADER, rows[:SHOWN_ROWS]))
        if len(rows) > SHOWN_ROWS:
            parts.append(line(f"{len(rows) - SHOWN_ROWS} more rows are in to_dict()."))
        for name, sites in grouped.items():
            methods = ", ".join(dict.fromkeys(site.method for site in sites))
            parts.append(line(f"{name}, {methods}: all rows of the batch together."))
            parts.append(table(BLOCK_HEADER, block_rows(sites)[:SHOWN_LAYERS]))
        reasons = dict.fromkeys((site.site, site.method, site.reason) for site in self.sites if site.reason)
        parts += [line(f"{site}, {method}: skipped, {reason}.") for site, method, reason in reasons]
        notes = dict.fromkeys((site.site, site.method, site.note) for site in self.sites if site.note)
        parts += [line(f"{site}, {method}: {note}.") for site, method, note in notes]
        if all(site.status != "applied" for site in self.sites):
            parts.append(line("No tokens were pruned."))
        if any(layer.dense_tokens is not None for layer in self.layers):
            parts.append(line("Layers of the decoder: visual tokens, length of the sequence at the prefill, KV cache."))
            parts.append(table(LAYER_HEADER, layer_rows(self.layers)[:SHOWN_LAYERS]))
        return parts


def build(session: SessionLike, inputs: Any = None, *, max_new_tokens: int = 16, repeats: int = 5) -> Report:
    """Report on a session; with `inputs`, also run dense and pruned in turn and compare.

    Args:
        session: a session whose model is patched.
        inputs: what the processor returned, as it would be given to ``generate``; for a model without ``generate`` (a
            vision transformer), the tensor or the keyword arguments it is called with. None reports the last forward
            only.
        max_new_tokens: greedy tokens to generate on both sides; the end of a sequence does not stop them.
        repeats: timed runs of each side, after one untimed run that counts arithmetic and memory.

    Raises:
        OptionError: an argument is out of range, `inputs` cannot be run, or the session has ended.
    """
    model, methods = type(session.model).__name__, tuple(map(_describe, session.methods))
    said: Any = {"remarks": getattr(session, "remarks", ())}
    if inputs is None:
        sites = tuple(SiteReport.of(trace) for trace in session.traces)
        return Report(model, methods, sites, layers=layers_of(sites), traffic=session.traffic, **said)
    if not session.installed:
        raise OptionError(
            "the model is not patched by this session any more, so there is nothing to compare; patch it again"
        )
    if not callable(getattr(session.model, "generate", None)):
        return _forward_report(session, inputs, repeats, Report(model, methods, (), **said))
    _check(session.model, inputs, max_new_tokens, repeats)
    inspected, timed, traces = _run(session, inputs, max_new_tokens, repeats)
    sites = tuple(SiteReport.of(*run) for run in zip(*traces, strict=True))
    seen = visual_tokens(sites)
    tokens = [] if seen is None else [Cost("visual_tokens", *seen)]
    selection = [sum(trace.overhead_ms for trace in run) for run in traces]
    costs = (*tokens, *latencies(timed, selection), *amounts(**inspected))
    setting = {**_machine(session.model), "repeats": repeats, "max_new_tokens": max_new_tokens}
    layers = layers_of(sites, **inspected)
    drifted = drift(**inspected, eos=end_ids(session.model))
    lacking = dict.fromkeys(remark for seen_of in inspected.values() for remark in seen_of.remarks)
    said["remarks"] = (*said["remarks"], *lacking)
    return Report(model, methods, sites, setting, costs, drifted, layers, break_even(costs), session.traffic, **said)


def _forward_report(session: SessionLike, inputs: Any, repeats: int, report: Report) -> Report:
    """The report of a model without ``generate``: of one forward."""
    from tokenprune.report.encoding import forward_costs

    costs, sentences, traces = forward_costs(
        session.model, inputs, pause=session.pause, traces=lambda: session.traces, repeats=repeats
    )
    sites = tuple(SiteReport.of(*run) for run in zip(*traces, strict=True))
    setting = {**_machine(session.model), "repeats": repeats}
    return dataclasses.replace(
        report, sites=sites, setting=setting, costs=tuple(costs), remarks=(*report.remarks, *sentences)
    )


def _run(
    session: SessionLike, inputs: Mapping[str, Any], max_new_tokens: int, repeats: int
) -> tuple[dict[str, Inspection], dict[str, list[Generation]], list[Sequence[Trace]]]:
    """Look into one run of each side, then time both in turn; the traces are those of the timed pruned runs."""
    inspected: dict[str, Inspection] = {}
    timed: dict[str, list[Generation]] = {"dense": [], "pruned": []}
    traces: list[Sequence[Trace]] = []
    turns = [("look", side) for side in timed] + [("time", side) for side in rounds(tuple(timed), repeats)]
    for kind, side in progress(turns, label="dense and pruned in turn"):
        with session.pause() if side == "dense" else nullcontext():
            if kind == "look":
                inspected[side] = inspect_generation(session.model, inputs, max_new_tokens=max_new_tokens)
                continue
            timed[side].append(time_generation(session.model, inputs, max_new_tokens=max_new_tokens))
        if side == "pruned":
            traces.append(session.traces)
    return inspected, timed, traces


def _describe(method: Any) -> str:
    """A method with the options that differ from their defaults, and `keep`."""
    if not dataclasses.is_dataclass(method):
        return repr(method)
    options = [(entry, getattr(method, entry.name)) for entry in dataclasses.fields(method) if entry.repr]
    shown = [f"{entry.name}={value!r}" for entry, value in options if entry.name == "keep" or value != entry.default]
    return f"{type(method).__name__}({', '.join(shown)})"


def _check(model: nn.Module, inputs: Any, max_new_tokens: int, repeats: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("repeats", repeats)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be an int of at least 1, got {value!r}")
    if not isinstance(inputs, Mapping):
        raise OptionError(
            f"inputs must map argument names to tensors, as what a processor returns does, got {type(inputs).__name__}"
        )
    if prompt_of(inputs) is None:
        raise OptionError(
            f"inputs hold no prompt: a tensor {' or '.join(PROMPTS)} is needed (with a processor: "
            f'return_tensors="pt"); got {sorted(map(str, inputs)) or "nothing"}'
        )
    if taken := not_inputs(inputs):
        raise OptionError(
            f"inputs must not hold {', '.join(taken)}: a report runs the prompt from its start and decides itself how "
            "to generate; leave that out"
        )


def _machine(model: nn.Module) -> dict[str, Any]:
    weight = next(model.parameters())
    if weight.device.type == "cuda":
        return {"device": torch.cuda.get_device_name(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}
    threads = torch.get_num_threads()
    return {"device": weight.device.type, "dtype": str(weight.dtype).removeprefix("torch."), "threads": threads}


def _cost_row(cost: Cost) -> list[str]:
    cells = [cost.name]
    for value, spread in ((cost.dense, cost.dense_range), (cost.pruned, cost.pruned_range)):
        cells.append(number(value) + (f" ({number(spread[0])}-{number(spread[1])})" if spread else ""))
    saved, factor = cost.saved, cost.factor
    return [*cells, "-" if saved is None else f"{100 * saved:.1f} %", "-" if factor is None else f"{factor:.2f}x"]
