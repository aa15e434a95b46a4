"""One forward of a model without ``generate``, such as a vision transformer: timed or inspected."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenprune.report.measure import Meter, latency_ms, watch_memory

SHOWN_ROWS = 8


@dataclass(frozen=True)
class ForwardInspection:
    """What does not vary from run to run.

    Attributes:
        output: the first floating-point tensor that the model returned, rows first; None if there was none.
        amounts: `peak_mib`, `resident_peak_mib` where the system tells it, `total_flops_g`.
    """

    output: Tensor | None
    amounts: dict[str, float]


def _forward(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def time_forward(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a forward, as `forward_latency_ms`.

    Args:
        model: takes `inputs` as its one argument or, if it is a mapping, as its keyword arguments.
        inputs: what it is called with.
    """
    device = next(model.parameters()).device
    return {"forward_latency_ms": latency_ms(lambda: _forward(model, inputs), device=device)}


def inspect_forward(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> ForwardInspection:
    """Run a forward and note what it computed, held and returned; arguments as in :func:`time_forward`."""
    meter = Meter()
    with meter:
        read_memory = watch_memory((parameter.device for parameter in model.parameters()), meter)
        output = _forward(model, inputs)
        memory = read_memory()
    values = list(output.values()) if isinstance(output, Mapping) else output
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return ForwardInspection(next(iter(tensors), None), {**memory, "total_flops_g": meter.flops / 1e9})


def agreement(dense: ForwardInspection, pruned: ForwardInspection) -> list[str]:
    """How far the outputs of two runs on the same inputs agree, as sentences."""
    expected, actual = dense.output, pruned.output
    if expected is None or actual is None or expected.shape != actual.shape:
        return ["The outputs differ in shape."]
    rows = expected.float().flatten(1), actual.float().flatten(1)
    cosines = torch.nn.functional.cosine_similarity(*rows)[:SHOWN_ROWS].tolist()
    said = [f"Drift, row by row: cosine of the outputs {', '.join(f'{cosine:.4f}' for cosine in cosines)}."]
    if expected.ndim == 2:
        n_same = int((rows[0].argmax(1) == rows[1].argmax(1)).sum())
        said.append(f"The largest entry is the same in {n_same} of {len(expected)} rows.")
    return said
