"""Dense against pruned for a model without ``generate``, such as a vision transformer: one forward of each, in turn."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenprune.errors import OptionError
from tokenprune.report.costs import Cost
from tokenprune.report.measure import alternate, flops_g, peak_mib, watch_resident
from tokenprune.signals import Trace


def forward_costs(
    model: nn.Module,
    inputs: Any,
    *,
    pause: Callable[[], AbstractContextManager[Any]],
    traces: Callable[[], Sequence[Trace]],
    repeats: int,
) -> tuple[list[Cost], list[str], list[Sequence[Trace]]]:
    """Run `model` dense and pruned.

    Args:
        model: the patched model.
        inputs: its one argument, or its keyword arguments.
        pause: makes a context in which it runs dense.
        traces: those of the last forward.
        repeats: timed runs of each side.

    Returns:
        What was measured, how far the outputs agree, and the traces of the pruned runs.

    Raises:
        OptionError: `inputs` is neither a tensor nor a mapping.
    """
    if not isinstance(inputs, Tensor | Mapping):
        raise OptionError(
            f"inputs must be a tensor or map argument names to tensors, got {type(inputs).__name__}; for a vision "
            "transformer give what it is called with"
        )
    seen: list[Sequence[Trace]] = []

    def run(*, dense: bool) -> Any:
        with torch.no_grad(), pause() if dense else nullcontext():
            output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        if not dense:
            seen.append(traces())
        return output

    calls: dict[str, Callable[[], Any]] = {"dense": lambda: run(dense=True), "pruned": lambda: run(dense=False)}
    agreement = _agreement(calls["dense"](), calls["pruned"]())
    devices = list({parameter.device for parameter in model.parameters()})
    dense, pruned = calls["dense"], calls["pruned"]
    arithmetic = Cost("total_flops_g", flops_g(dense), flops_g(pruned))
    memory = [Cost("peak_mib", peak_mib(dense, devices=devices), peak_mib(pruned, devices=devices))]
    resident = _resident(dense, devices), _resident(pruned, devices)
    if resident[0] is not None and resident[1] is not None:
        memory.append(Cost("resident_peak_mib", resident[0], resident[1]))
    seen.clear()
    timed = alternate(calls, repeats=repeats, device=devices[0])
    ranges = [(one.quantile(0.2), one.quantile(0.8)) for one in timed.values()]
    latency = Cost("forward_latency_ms", timed["dense"].median, timed["pruned"].median, *ranges)
    selection = [sum(trace.overhead_ms for trace in run) for run in seen[1:]]
    spent = Cost("selection_latency_ms", 0.0, sorted(selection)[len(selection) // 2])
    return [latency, spent, *memory, arithmetic], agreement, seen[1:]


def _resident(call: Callable[[], Any], devices: Sequence[torch.device]) -> float | None:
    """Peak resident memory of the process during a call."""
    with watch_resident(devices) as read:
        call()
        return read()


def _agreement(dense: Any, pruned: Any) -> list[str]:
    """How far the first floating-point tensor of two outputs agrees, as sentences."""
    pair = [
        next((x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()), None)
        for out in (_values(dense), _values(pruned))
    ]
    if pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape:
        return ["The outputs differ in shape."]
    rows = [x.float().flatten(1) for x in pair if x is not None]
    cosine = torch.nn.functional.cosine_similarity(rows[0], rows[1])
    found = [f"Drift, row by row: cosine of the outputs {', '.join(f'{value:.4f}' for value in cosine[:8].tolist())}."]
    if pair[0].ndim == 2:
        same = int((rows[0].argmax(1) == rows[1].argmax(1)).sum())
        found.append(f"The largest entry is the same in {same} of {len(rows[0])} rows.")
    return found


def _values(output: Any) -> Any:
    return list(output.values()) if isinstance(output, Mapping) else output
