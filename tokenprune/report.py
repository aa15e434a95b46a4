"""What was pruned, why not, and what it cost: dense against pruned, measured in turn on the caller's own inputs."""

import dataclasses
import html
import json
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenprune.comparison import Cost, Drift, amounts, drift, latencies
from tokenprune.errors import OptionError, UnsupportedModelError
from tokenprune.generation import GREEDY, Generation, Inspection, inspect_generation, time_generation
from tokenprune.measure import rounds
from tokenprune.signals import Trace
from tokenprune.tables import as_html, as_markdown, as_text, number, plain

WIDTH = 100
SHOWN_ROWS = 12
NOT_INPUTS = {
    *GREEDY,
    "max_new_tokens",
    "max_length",
    "logits_processor",
    "generation_config",
    "past_key_values",
    "labels",
}


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

    def pause(self) -> AbstractContextManager[Any]:
        """Run dense inside the returned context."""


@dataclass(frozen=True)
class SiteReport:
    """One site of one forward: a :class:`~tokenprune.signals.Trace` without its tensors; same names, same meaning."""

    site: str
    layer: int | None
    method: str
    status: str
    reason: str
    n_in: tuple[int, ...]
    n_out: tuple[int, ...]
    images: tuple[tuple[int, ...], ...]
    radius: tuple[tuple[float, ...], ...] | None
    overhead_ms: float

    @classmethod
    def of(cls, *traces: Trace) -> "SiteReport":
        """Take over what the traces of a site say, one trace a run; of their times the median counts."""
        said = {entry.name: getattr(traces[-1], entry.name) for entry in dataclasses.fields(cls)}
        return cls(**{**said, "overhead_ms": statistics.median(trace.overhead_ms for trace in traces)})


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
    """

    model: str
    methods: tuple[str, ...]
    sites: tuple[SiteReport, ...]
    setting: dict[str, Any] = field(default_factory=dict)
    costs: tuple[Cost, ...] = ()
    drift: Drift | None = None

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
        result: dict[str, Any] = plain(data)
        return result

    def to_json(self, *, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_markdown(self) -> str:
        """The report as Markdown."""
        return "\n\n".join(self._parts(as_markdown, lambda line: line))

    def __str__(self) -> str:
        """The report as text of at most 100 columns."""
        return "\n\n".join(self._parts(as_text, lambda line: textwrap.fill(line, WIDTH, subsequent_indent="  ")))

    def _repr_html_(self) -> str:
        return "\n".join(self._parts(as_html, lambda line: f"<p>{html.escape(line)}</p>"))

    def _parts(self, table: Callable[[list[str], list[list[str]]], str], line: Callable[[str], str]) -> list[str]:
        parts = [line(f"tokenprune: {self.model}, {' + '.join(self.methods)}")]
        if not self.sites:
            parts.append(line("No forward with a prompt has run through this session yet: there is nothing to report."))
            return parts
        header = ["site", "layer", "method", "status", "row", "images", "in", "out", "kept", "radius", "site ms"]
        rows = [row for site in self.sites for row in _site_rows(site)]
        parts.append(table(header, rows[:SHOWN_ROWS]))
        if len(rows) > SHOWN_ROWS:
            parts.append(line(f"{len(rows) - SHOWN_ROWS} more rows are in to_dict()."))
        parts += [line(f"{site.site}, {site.method}: skipped, {site.reason}.") for site in self.sites if site.reason]
        if all(site.status != "applied" for site in self.sites):
            parts.append(line("Nothing was pruned."))
        if self.costs:
            setting = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.setting.items())
            parts.append(line(f"Dense against pruned, in turn; median (20 % - 80 % of the runs). {setting}."))
            parts.append(table(["", "dense", "pruned", "saved", "factor"], [_cost_row(cost) for cost in self.costs]))
        return parts + [line(sentence) for sentence in _drift_sentences(self.drift)]


def build(session: SessionLike, inputs: Any = None, *, max_new_tokens: int = 16, repeats: int = 5) -> Report:
    """Report on a session; with `inputs`, also run dense and pruned in turn and compare.

    Args:
        session: a session whose model is patched.
        inputs: what the processor returned, as it would be given to ``generate``; None reports the last forward only.
        max_new_tokens: greedy tokens to generate on both sides; the end of a sequence does not stop them.
        repeats: timed runs of each side, after one untimed run that counts arithmetic and memory.

    Raises:
        OptionError: an argument is out of range, `inputs` cannot be run, or the session has ended.
        UnsupportedModelError: the model has no ``generate``.
    """
    model, methods = type(session.model).__name__, tuple(map(_describe, session.methods))
    if inputs is None:
        return Report(model, methods, tuple(SiteReport.of(trace) for trace in session.traces))
    if not session.installed:
        raise OptionError(
            "the model is not patched by this session any more, so there is nothing to compare; patch it again"
        )
    _check(session.model, inputs, max_new_tokens, repeats)
    inspected: dict[str, Inspection] = {}
    timed: dict[str, list[Generation]] = {"dense": [], "pruned": []}
    for side in timed:
        with session.pause() if side == "dense" else nullcontext():
            inspected[side] = inspect_generation(session.model, inputs, max_new_tokens=max_new_tokens)
    traces: list[Sequence[Trace]] = []
    for side in rounds(tuple(timed), repeats):
        with session.pause() if side == "dense" else nullcontext():
            timed[side].append(time_generation(session.model, inputs, max_new_tokens=max_new_tokens))
        if side == "pruned":
            traces.append(session.traces)
    sites = tuple(SiteReport.of(*run) for run in zip(*traces, strict=True))
    costs = (*_tokens(sites), *latencies(timed), *amounts(**inspected))
    setting = {**_machine(session.model), "repeats": repeats, "max_new_tokens": max_new_tokens}
    eos = getattr(getattr(session.model, "generation_config", None), "eos_token_id", None)
    return Report(model, methods, sites, setting, costs, drift(**inspected, eos=eos))


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
    if not any(isinstance(inputs.get(name), Tensor) for name in ("input_ids", "inputs_embeds")):
        raise OptionError(
            "inputs hold no prompt: a tensor `input_ids` or `inputs_embeds` is needed (with a processor: "
            f'return_tensors="pt"); got {sorted(map(str, inputs)) or "nothing"}'
        )
    if taken := sorted(NOT_INPUTS.intersection(inputs)):
        raise OptionError(
            f"inputs must not hold {', '.join(taken)}: a report runs the prompt from its start and decides itself how "
            "to generate; leave that out"
        )
    if not callable(getattr(model, "generate", None)):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no generate(), so there is nothing to measure; call report() without inputs"
        )


def _tokens(sites: Sequence[SiteReport]) -> list[Cost]:
    seen = [site for site in sites if site.n_in]
    return [Cost("visual_tokens", sum(seen[0].n_in), sum(seen[-1].n_out or seen[-1].n_in))] if seen else []


def _machine(model: nn.Module) -> dict[str, Any]:
    weight = next(model.parameters())
    if weight.device.type == "cuda":
        return {"device": torch.cuda.get_device_name(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}
    threads = torch.get_num_threads()
    return {"device": weight.device.type, "dtype": str(weight.dtype).removeprefix("torch."), "threads": threads}


def _site_rows(site: SiteReport) -> list[list[str]]:
    head = [site.site, "-" if site.layer is None else str(site.layer), site.method[:14], site.status]
    rows = []
    for row, n_in in enumerate(site.n_in):
        n_out = site.n_out[row] if row < len(site.n_out) else n_in
        images = str(len(site.images[row])) if row < len(site.images) else "-"
        radius = max(site.radius[row], default=None) if site.radius is not None else None
        kept = f"{100 * n_out / n_in:.1f} %" if n_in else "-"
        rows.append(
            [
                *head,
                str(row),
                images,
                f"{n_in:,}",
                f"{n_out:,}",
                kept,
                number(radius),
                "" if row else number(site.overhead_ms),
            ]
        )
    return rows or [[*head, *["-"] * 7]]


def _cost_row(cost: Cost) -> list[str]:
    cells = [cost.name]
    for value, spread in ((cost.dense, cost.dense_range), (cost.pruned, cost.pruned_range)):
        cells.append(number(value) + (f" ({number(spread[0])}-{number(spread[1])})" if spread else ""))
    saved, factor = cost.saved, cost.factor
    return [*cells, "-" if saved is None else f"{100 * saved:.1f} %", "-" if factor is None else f"{factor:.2f}x"]


def _drift_sentences(drift: Drift | None) -> list[str]:
    if drift is None:
        return []
    pairs = [f"{equal} of {limit}" for equal, limit in zip(drift.equal_tokens, drift.compared_tokens, strict=True)]
    kl = ", ".join(number(value) for value in drift.first_token_kl[:SHOWN_ROWS])
    return [
        f"Drift, row by row: KL of the first token, dense from pruned, {kl} nats; greedy tokens equal before the first "
        f"difference: {', '.join(pairs[:SHOWN_ROWS])}."
    ]
