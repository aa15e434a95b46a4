"""Dense against pruned: what runs of both sides say about cost and about answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tokenprune.report.generation import Generation, Inspection
from tokenprune.report.measure import Timing
from tokenprune.report.tables import number

SHOWN_ROWS = 12


@dataclass(frozen=True)
class Cost:
    """One quantity, dense against pruned.

    Attributes:
        name: what was measured, its unit last (`first_token_latency_ms`).
        dense: value without pruning; the median where it was timed.
        pruned: value with pruning, likewise.
        dense_range: 20 % and 80 % quantiles of the timed runs; None for what does not vary.
        pruned_range: likewise.
    """

    name: str
    dense: float
    pruned: float
    dense_range: tuple[float, float] | None = None
    pruned_range: tuple[float, float] | None = None

    @property
    def saved(self) -> float | None:
        """Fraction saved; negative where pruning costs more."""
        return 1.0 - self.pruned / self.dense if self.dense else None

    @property
    def factor(self) -> float | None:
        """Dense over pruned; None where one of them is nothing."""
        return self.dense / self.pruned if self.dense and self.pruned else None


LATENCIES = {
    "encoder_latency_ms": "encoder_ms",
    "prefill_latency_ms": "prefill_ms",
    "first_token_latency_ms": "first_token_ms",
    "decode_latency_ms": "decode_ms",
    "total_latency_ms": "total_ms",
}
STAGES = ("first_token", "encoder", "selection", "prefill", "head", "decode")


def latencies(timed: Mapping[str, Sequence[Generation]], selection: Sequence[float]) -> list[Cost]:
    """Latencies of the timed runs of the sides "dense" and "pruned".

    Args:
        timed: the runs of each side.
        selection: milliseconds that each pruned run spent at its sites, as its traces say.

    Returns:
        `encoder`: everything before the decoder. `selection`: at the sites; it is part of the stages they lie in.
        `prefill`: the decoder over the prompt. `first_token`: from the call to the first token, the two before
        included. `decode`: each token after the first. `total`: end to end.
    """
    costs = []
    for name, attribute in LATENCIES.items():
        dense, pruned = ([getattr(run, attribute) for run in timed[side]] for side in ("dense", "pruned"))
        if None not in dense and None not in pruned:
            costs.append(_timed(name, dense, pruned))
        if name == "encoder_latency_ms":
            costs.append(_timed("selection_latency_ms", [0.0] * len(selection), selection))
    return costs


def _timed(name: str, *samples: Sequence[float]) -> Cost:
    dense, pruned = (Timing(tuple(side)) for side in samples)
    ranges = [(side.quantile(0.2), side.quantile(0.8)) for side in (dense, pruned)]
    return Cost(name, dense.median, pruned.median, *ranges)


def amounts(dense: Inspection, pruned: Inspection) -> list[Cost]:
    """Memory and arithmetic of two runs on the same inputs."""
    costs = [Cost("peak_mib", dense.peak_mib, pruned.peak_mib)]
    for name in ("resident_peak_mib", "kv_mib"):
        pair = getattr(dense, name), getattr(pruned, name)
        if None not in pair:
            costs.append(Cost(name, *pair))
    for stage in STAGES:
        if stage in dense.flops_g and (stage != "decode" or dense.new_ids.shape[1] > 1):
            costs.append(Cost(f"{stage}_flops_g", dense.flops_g[stage], pruned.flops_g.get(stage, 0.0)))
        if stage == "prefill" and dense.formula_flops_g is not None and pruned.formula_flops_g is not None:
            costs.append(Cost("prefill_formula_flops_g", dense.formula_flops_g, pruned.formula_flops_g))
    return [*costs, Cost("total_flops_g", sum(dense.flops_g.values()), sum(pruned.flops_g.values()))]


@dataclass(frozen=True)
class BreakEven:
    """From how many visual tokens on pruning pays on this machine, estimated from the runs of one report.

    What is measured is one prompt of `N` visual tokens of which `M` are left in the end. Its time to the first token
    gives the time that a dropped token saves, `s = (dense - pruned + selection) / (N - M)`, and the traces give the
    time that choosing takes, `selection`. At the same fraction kept, `n` visual tokens would save `s n (1 - M / N)`,
    which equals `selection` at the number given here.

    It is a straight line through two points, and it errs in both directions: selection takes less time on fewer tokens
    (the true number is lower), a dropped token saves less in a shorter prompt, where fixed costs weigh more (the true
    number is higher), and work that pruning adds outside of its sites is counted as savings lost. Take it for an order
    of magnitude, and measure near it.

    Attributes:
        visual_tokens: the number, all rows of the batch together; None where nothing was dropped or saved, so that no
            number of tokens can be told.
        saved_ms_per_token: `s`, negative where pruning costs more than it saves before any selection.
        selection_ms: `selection`.
        shares: part of the dense end-to-end time by stage, in order: `encoder`, `prefill`, `head` (with everything
            else before the first token), `decode`.
    """

    visual_tokens: float | None
    saved_ms_per_token: float | None
    selection_ms: float
    shares: dict[str, float]

    @property
    def dominant(self) -> str:
        """The stage that takes the largest part of the dense time: what else could be saved at all."""
        return max(self.shares, key=lambda stage: self.shares[stage])


def break_even(costs: Sequence[Cost]) -> BreakEven | None:
    """Estimate from the costs of a report; None if there was no visual token."""
    by_name = {cost.name: cost for cost in costs}
    tokens, first = by_name.get("visual_tokens"), by_name["first_token_latency_ms"]
    if tokens is None:
        return None
    selection, dropped = by_name["selection_latency_ms"].pruned, tokens.dense - tokens.pruned
    each = (first.dense - first.pruned + selection) / dropped if dropped else None
    number = selection / (each * dropped / tokens.dense) if each is not None and each > 0 else None
    total = by_name["total_latency_ms"].dense
    stages = {"encoder": by_name.get("encoder_latency_ms"), "prefill": by_name.get("prefill_latency_ms")}
    shares = {name: cost.dense / total for name, cost in stages.items() if cost is not None}
    shares["head" if shares else "first_token"] = max(0.0, first.dense / total - sum(shares.values()))
    shares["decode"] = max(0.0, 1.0 - first.dense / total)
    return BreakEven(number, each, selection, shares)


@dataclass(frozen=True)
class Drift:
    """How far the pruned model's answers are from the dense ones. One entry per row of the batch.

    Attributes:
        first_token_kl: KL divergence of the first token's distribution, dense from pruned, in nats.
        equal_tokens: greedy tokens that agree before the first that does not.
        compared_tokens: greedy tokens compared: up to the dense answer's end of sequence.
    """

    first_token_kl: tuple[float, ...]
    equal_tokens: tuple[int, ...]
    compared_tokens: tuple[int, ...]


def drift(dense: Inspection, pruned: Inspection, *, eos: int | list[int] | None = None) -> Drift:
    """Compare the answers of two runs on the same inputs; `eos` are the ids that end a sequence."""
    expected, actual = (side.first_logits.double().log_softmax(-1) for side in (dense, pruned))
    terms = expected.exp() * (expected - actual)
    kl = torch.where(expected.exp() > 0, terms, 0.0).sum(-1)
    stops = torch.tensor([] if eos is None else eos, dtype=dense.new_ids.dtype, device=dense.new_ids.device)
    ends = torch.isin(dense.new_ids, stops)
    unequal = dense.new_ids != pruned.new_ids
    compared = [_first(row, len(row) - 1) + 1 for row in ends.tolist()]
    equal = [min(_first(row, len(row)), limit) for row, limit in zip(unequal.tolist(), compared, strict=True)]
    return Drift(tuple(0.0 if value < 0 else value for value in kl.tolist()), tuple(equal), tuple(compared))


def _first(flags: list[bool], otherwise: int) -> int:
    return flags.index(True) if True in flags else otherwise


def drift_sentences(drift: Drift | None) -> list[str]:
    """What a report says of the drift."""
    if drift is None:
        return []
    pairs = [f"{equal} of {limit}" for equal, limit in zip(drift.equal_tokens, drift.compared_tokens, strict=True)]
    kl = ", ".join(number(value) for value in drift.first_token_kl[:SHOWN_ROWS])
    return [
        f"Drift, row by row: KL of the first token, dense from pruned, {kl} nats; greedy tokens equal before the first "
        f"difference: {', '.join(pairs[:SHOWN_ROWS])}."
    ]


def break_even_sentences(found: BreakEven | None) -> list[str]:
    """What a report says of the break-even."""
    if found is None:
        return []
    parts = ", ".join(f"{name.replace('_', ' ')} {100 * share:.0f} %" for name, share in found.shares.items())
    stages = f"Of the dense time: {parts}; {found.dominant.replace('_', ' ')} takes the most."
    if found.saved_ms_per_token is None:
        return [stages]
    each = f"{number(found.saved_ms_per_token)} ms saved per dropped token, {number(found.selection_ms)} ms selection"
    if found.visual_tokens is None:
        return [
            stages,
            f"Break-even: none; at this size dropping tokens does not bring the first token nearer ({each}).",
        ]
    least = f"{max(1, round(found.visual_tokens)):,}"
    told = f"the first token comes sooner from about {least} visual tokens on ({each})."
    return [stages, f"Break-even, estimated from these runs: {told}"]
