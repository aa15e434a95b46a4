"""Methods at equal arithmetic: what the decoder's layers cost in a prefill, and options that bring a method to it.

Before the decoder, `keep` says it all. A method that drops tokens inside it has options of its own, and comparing it at
the same `keep` would compare runs of different cost. So each is set to the dearest options whose decoder costs no more
than a decoder that gets `keep` of the visual tokens from the start. Costs are of runs: the lengths that the layers see
(`tokenprune.report.generation`), in a formula for linear maps and attention; selection is not in it, the rows say it
apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from names import decoder_flops_g

import tokenprune
from tokenprune.parsing import parse_methods
from tokenprune.report.generation import inspect_generation
from tokenprune.schedule import count

Methods = tuple[tokenprune.Method, ...]
SLACK = 1.02  # what a match may cost more than it should
CHOSEN = re.compile(r"\b(keep|merge|r|radius|tokens)\s*=\s*(?!None)")  # options that say how much is kept


class OutOfReach(Exception):
    """No options of the method make the decoder that cheap."""


@dataclass(frozen=True)
class Cost:
    """One prefill of the probe.

    Attributes:
        decoder_flops_g: of the decoder's layers, by formula.
        prefill_flops_g: of everything up to the first token, selection included, as counted; None where not
            counted.
        tokens: visual tokens in a layer, mean over the layers.
    """

    decoder_flops_g: float
    prefill_flops_g: float | None
    tokens: float


class Probe:
    """One example whose prefill is measured.

    Args:
        model: the model.
        inputs: of ``generate``, one row.
        n_visual: visual tokens among them.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], n_visual: int) -> None:
        self.model, self.inputs, self.n_visual = model, inputs, n_visual
        self._known: dict[Methods, Cost] = {}
        self.dense = self._measure(self.inputs)

    def cost(self, methods: Methods) -> Cost:
        """What a prefill costs under these methods."""
        if methods not in self._known:
            with tokenprune.patch(self.model, list(methods)):
                self._known[methods] = self._measure(self.inputs)
        return self._known[methods]

    @torch.inference_mode()
    def _measure(self, inputs: dict[str, Any]) -> Cost:
        seen = inspect_generation(self.model, inputs, max_new_tokens=1)
        lengths, n_text = seen.layer_tokens, inputs["input_ids"].shape[1] - self.n_visual
        flops = decoder_flops_g(self.model.get_decoder(), rows=1, lengths=lengths)
        if flops is None:  # experts or the like: tokens in all layers represent arithmetic
            flops = sum(lengths) / 1e9
        return Cost(flops, seen.amounts["total_flops_g"], sum(lengths) / len(lengths) - n_text)


def is_fixed(text: str) -> bool:
    """Whether a method's text says itself how much is kept."""
    return bool(CHOSEN.search(text))


def matched(text: str, keep: float, probe: Probe) -> Methods:
    """The methods that `text` names, set to cost the decoder what `keep` of the visual tokens would.

    Raises:
        OutOfReach: they cannot be.
    """
    methods = parse_methods(text, keep=keep)
    wanted = count(keep, probe.n_visual)
    target = probe.cost(parse_methods("uniform", keep=wanted)).decoder_flops_g
    inside = any({"llm_layer", "kv_cache"} & set(method.sites()) for method in methods)
    if not inside and methods[0].keep == keep:
        return methods
    best = None
    for ladder in _ladders(methods, probe.n_visual):
        found = _climb(ladder, target * SLACK, probe)
        cost = -1.0 if found is None else probe.cost(found).decoder_flops_g
        if found is not None and (best is None or cost > probe.cost(best).decoder_flops_g * SLACK):
            best = found
    if best is None:
        raise OutOfReach(f"{text} cannot bring the decoder down to what keep={keep:g} costs")
    return best


def _climb(ladder: Sequence[Methods], limit: float, probe: Probe) -> Methods | None:
    """The dearest rung within the limit; rungs ascend in cost. The first ones may be refused: too little would be
    left."""

    def cost(rung: Methods) -> float:
        try:
            return probe.cost(rung).decoder_flops_g
        except tokenprune.OptionError:
            return 0.0

    low, high = -1, len(ladder) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if cost(ladder[middle]) <= limit:
            low = middle
        else:
            high = middle - 1
    return ladder[low] if low >= 0 and cost(ladder[low]) else None


def _ladders(methods: Methods, n_visual: int) -> list[list[Methods]]:
    """Options to choose from, as lists that ascend in cost. The first method is the one that is set."""
    first, rest = methods[0], methods[1:]
    counts = range(1, n_visual + 1)
    if first.name == "aim":
        return [[(one, *rest) for one in ladder] for ladder in _aim(first, n_visual)]
    if first.name == "spatten":
        return [[(replace(first, tokens=step / 128), *rest) for step in range(1, 129)]]
    if first.name == "fastv":
        usual = {entry.name: entry.default for entry in fields(first)}
        layers = range(first.layer, 0, -1) if first.layer == usual["layer"] else [first.layer]
        return [[(replace(first, keep=number, layer=layer), *rest) for number in counts] for layer in layers]
    return [[(replace(first, keep=step / 128), *rest) for step in range(1, 129)]]


def _aim(method: Any, n_visual: int) -> list[list[Any]]:
    """Merging is what is set, with the schedule as it is; where that is too cheap even without merging, merging alone.
    Without merging (`merge=None`) the schedule moves through the decoder."""
    counts = range(1, n_visual + 1)
    if method.merge is not None:
        with_schedule = [replace(method, merge=number) for number in counts]
        return [with_schedule] + ([] if method.prune is None else [[replace(one, prune=None) for one in with_schedule]])
    width = method.prune[1] - method.prune[0]
    starts = [step / 64 for step in range(65) if step / 64 + width <= 1.0]
    return [[replace(method, prune=(start, start + width)) for start in starts]]
