"""What was pruned, why not, and what it cost: dense against pruned, measured in turn on the caller's own inputs."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from tokenprune.errors import OptionError
from tokenprune.report.costs import BreakEven, Cost, Drift, agreement, break_even, costs_of, drift
from tokenprune.report.generation import (
    ForwardInspection,
    Inspection,
    inspect_forward,
    inspect_generation,
    time_forward,
    time_generation,
)
from tokenprune.report.measure import in_turn
from tokenprune.report.site_tables import (
    LayerReport,
    layer_parts,
    layers_of,
    site_of,
    site_parts,
    traffic_parts,
    visual_tokens,
)
from tokenprune.report.tables import Document, Part, Table, plain, settings
from tokenprune.signals import Trace, Traffic
from tokenprune.upstream.generating import PROMPTS, end_ids, not_inputs, prompt_of

if TYPE_CHECKING:
    from tokenprune.session import Session

TENSORS = ("kept_indices", "visual_indices", "assignment")
Inspected = TypeVar("Inspected", bound=Inspection | ForwardInspection)


@dataclass(frozen=True)
class Report(Document):
    """What :meth:`Session.report` returns; print it, or show it in a notebook.

    Attributes:
        model: class name of the model.
        methods: the methods with their options.
        sites: what happened at each site of the last forward with a prompt, without tensors; empty if there was none.
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
    sites: tuple[Trace, ...]
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
        found = {cost.name: cost for cost in self.costs}
        if name not in found:
            names = ", ".join(found) or "nothing: call report(inputs)"
            raise OptionError(f"{name!r} was not measured; measured: {names}")
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data: lists, dictionaries, strings, numbers; numbers that are not finite become None."""
        data = dataclasses.asdict(self)
        data["costs"] = [dict(dataclasses.asdict(cost), saved=cost.saved, factor=cost.factor) for cost in self.costs]
        data["sites"] = [{name: value for name, value in site.items() if name not in TENSORS} for site in data["sites"]]
        if self.break_even is not None:
            data["break_even"]["dominant"] = self.break_even.dominant
        result: dict[str, Any] = plain(data)
        return result

    def plot(self, path: str | Path) -> None:
        """Draw tokens by layer and latencies, dense against pruned, to an image file of the kind its name says.

        Raises:
            OptionError: nothing was measured, matplotlib is not installed, or the file cannot be written.
        """
        from tokenprune.report.plots import plot_report

        plot_report(path, title=f"{self.model}: {' + '.join(self.methods)}", layers=self.layers, costs=self.costs)

    def parts(self) -> Iterator[Part]:
        """The sentences and tables, in the order in which they are read."""
        yield f"tokenprune: {self.model}, {' + '.join(self.methods)}"
        yield from self.remarks
        if not self.sites and self.traffic is None:
            yield "No forward with a prompt has run through this session yet: there is nothing to report."
            return
        yield from site_parts(self.sites)
        yield from layer_parts(self.layers)
        if self.traffic is not None:
            yield from traffic_parts(self.traffic)
        if self.costs:
            yield f"Dense against pruned, in turn; median (20 % - 80 % of the runs). {settings(self.setting)}."
            yield Table(["", "dense", "pruned", "saved", "factor"], [cost.cells() for cost in self.costs])
        if self.drift is not None:
            yield self.drift.sentence()
        if self.break_even is not None:
            yield from self.break_even.sentences()


def build(session: "Session", inputs: Any = None, *, max_new_tokens: int = 16, repeats: int = 5) -> Report:
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
    methods = tuple(map(_describe, session.methods))
    report = Report(type(session.model).__name__, methods, (), traffic=session.traffic, remarks=session.remarks)
    if inputs is None:
        sites = tuple(map(site_of, session.traces))
        return dataclasses.replace(report, sites=sites, layers=layers_of(sites))
    if not session.installed:
        raise OptionError(
            "the model is not patched by this session any more, so there is nothing to compare; patch it again"
        )
    if not callable(getattr(session.model, "generate", None)):
        return _of_forward(session, report, inputs, repeats)
    _check(inputs, max_new_tokens, repeats)
    return _of_generation(session, report, inputs, max_new_tokens, repeats)


def _of_generation(session: "Session", report: Report, inputs: Any, max_new_tokens: int, repeats: int) -> Report:
    """The report of a model that generates: of greedy generations."""
    options: dict[str, Any] = {"inputs": inputs, "max_new_tokens": max_new_tokens}
    inspect, time = partial(inspect_generation, **options), partial(time_generation, **options)
    report, dense, pruned = _measured(session, report, inspect, time, repeats)
    return dataclasses.replace(
        report,
        setting={**report.setting, "max_new_tokens": max_new_tokens},
        drift=drift(dense, pruned, eos=end_ids(session.model)),
        layers=layers_of(report.sites, dense, pruned),
        break_even=break_even(report.costs),
        traffic=session.traffic,
        remarks=(*session.remarks, *dict.fromkeys([*dense.remarks, *pruned.remarks])),
    )


def _of_forward(session: "Session", report: Report, inputs: Any, repeats: int) -> Report:
    """The report of a model without ``generate``: of its forward."""
    if not isinstance(inputs, Tensor | Mapping):
        raise OptionError(
            f"inputs must be a tensor or map argument names to tensors, got {type(inputs).__name__}; for a vision "
            "transformer give what it is called with"
        )
    inspect, time = partial(inspect_forward, inputs=inputs), partial(time_forward, inputs=inputs)
    report, dense, pruned = _measured(session, report, inspect, time, repeats)
    return dataclasses.replace(report, remarks=(*session.remarks, *agreement(dense, pruned)))


def _measured(
    session: "Session",
    report: Report,
    inspect: Callable[[nn.Module], Inspected],
    time: Callable[[nn.Module], dict[str, float]],
    repeats: int,
) -> tuple[Report, Inspected, Inspected]:
    """The report with what happened at the sites and what it cost, and what an inspection saw dense and pruned."""
    traces: list[Sequence[Trace]] = []

    def timed(side: str) -> dict[str, float]:
        latencies = time(session.model)
        if side == "dense":
            return {**latencies, "selection_latency_ms": 0.0}
        traces.append(session.traces)
        return {**latencies, "selection_latency_ms": sum(trace.overhead_ms for trace in session.traces)}

    sides: dict[str, Callable[[], AbstractContextManager[Any]]] = {"dense": session.pause, "pruned": nullcontext}
    inspected = in_turn(sides, lambda _: inspect(session.model), repeats=1, label="memory and arithmetic")
    dense, pruned = inspected["dense"][0], inspected["pruned"][0]
    runs = in_turn(sides, timed, repeats=repeats, label="latency, dense and pruned in turn")
    sites = tuple(site_of(*same) for same in zip(*traces, strict=True))
    tokens = visual_tokens(sites)
    costs = [] if tokens is None else [Cost("visual_tokens", *tokens)]
    costs += [*costs_of(runs["dense"], runs["pruned"]), *costs_of([dense.amounts], [pruned.amounts])]
    setting = {**_machine(session.model), "repeats": repeats}
    return dataclasses.replace(report, sites=sites, setting=setting, costs=tuple(costs)), dense, pruned


def _describe(method: Any) -> str:
    """A method with the options that differ from their defaults, and `keep`."""
    if not dataclasses.is_dataclass(method):
        return repr(method)
    options = [(entry, getattr(method, entry.name)) for entry in dataclasses.fields(method) if entry.repr]
    shown = [f"{entry.name}={value!r}" for entry, value in options if entry.name == "keep" or value != entry.default]
    return f"{type(method).__name__}({', '.join(shown)})"


def _check(inputs: Any, max_new_tokens: int, repeats: int) -> None:
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
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.device.type == "cuda":
        return {"device": torch.cuda.get_device_name(weight.device), "dtype": dtype}
    return {"device": weight.device.type, "dtype": dtype, "threads": torch.get_num_threads()}
