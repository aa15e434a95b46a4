"""Dense against pruned: what runs of both sides say about cost and about answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributions import Categorical, kl_divergence

from tokenprune.report.generation import ForwardInspection, Inspection
from tokenprune.report.measure import spread
from tokenprune.report.tables import factor, number, percent

SHOWN_ROWS = 12


@dataclass(frozen=True)
class Cost:
    """One quantity, dense against pruned.

    Attributes:
        name: what was measured, its unit last (`first_token_latency_ms`).
        dense: value without pruning; the median where there were several runs.
        pruned: value with pruning, likewise.
        dense_range: 20 % and 80 % quantiles of several runs; None for what was measured once.
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

    def cells(self) -> list[str]:
        """The row of a table."""
        cells = [self.name]
        for value, quantiles in ((self.dense, self.dense_range), (self.pruned, self.pruned_range)):
            cells.append(number(value) + (f" ({'-'.join(map(number, quantiles))})" if quantiles else ""))
        return [*cells, percent(self.saved), factor(self.dense, self.pruned)]


def costs_of(dense: Sequence[Mapping[str, float]], pruned: Sequence[Mapping[str, float]]) -> list[Cost]:
    """The quantities that the runs of both sides tell, in the order of the dense ones."""
    costs = []
    for name in [name for name in dense[0] if name in pruned[0]]:
        sides = [spread([run[name] for run in runs]) for runs in (dense, pruned)]
        ranges = [(low, high) for _, low, high in sides] if len(dense) > 1 else []
        costs.append(Cost(name, sides[0][0], sides[1][0], *ranges))
    return costs


@dataclass(frozen=True)
class BreakEven:
    """From how many visual tokens on pruning pays on this machine, estimated from the runs of one report.

    What is measured is one prompt of `N` visual tokens of which `M` are kept to the end. Its time to the first token
    gives the time that a dropped token saves, `s = (dense - pruned + selection) / (N - M)`, and the traces give the
    time that choosing takes, `selection`. At the same fraction kept, `n` visual tokens would save `s n (1 - M / N)`,
    which equals `selection` at the number given here.

    It is a straight line through two points, and it errs in both directions: selection takes less time on fewer tokens
    (the true number is lower), a dropped token saves less in a shorter prompt, where fixed costs weigh more (the true
    number is higher), and work that pruning adds outside of its sites is counted as savings lost. Take it for an order
    of magnitude, and measure near it.

    Attributes:
        visual_tokens: the number, all rows of the batch together; None where nothing was dropped or saved.
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

    def sentences(self) -> list[str]:
        """What a report says of it."""
        parts = ", ".join(f"{name.replace('_', ' ')} {percent(share, 0)}" for name, share in self.shares.items())
        stages = f"Of the dense time: {parts}; {self.dominant.replace('_', ' ')} takes the most."
        if self.saved_ms_per_token is None:
            return [stages]
        each = f"{number(self.saved_ms_per_token)} ms saved per dropped token, {number(self.selection_ms)} ms selection"
        if self.visual_tokens is None:
            return [stages, f"Break-even: none; at this size pruning does not make the first token earlier ({each})."]
        least = f"from about {max(1, round(self.visual_tokens)):,} visual tokens on"
        return [stages, f"Break-even, estimated from these runs: the first token comes earlier {least} ({each})."]


def break_even(costs: Sequence[Cost]) -> BreakEven | None:
    """Estimate from the costs of a report; None if there was no visual token."""
    found = {cost.name: cost for cost in costs}
    if "visual_tokens" not in found:
        return None
    tokens, first = found["visual_tokens"], found["first_token_latency_ms"]
    selection, dropped = found["selection_latency_ms"].pruned, tokens.dense - tokens.pruned
    each = (first.dense - first.pruned + selection) / dropped if dropped else None
    number = selection / (each * dropped / tokens.dense) if each is not None and each > 0 else None
    total = found["total_latency_ms"].dense
    names = {"encoder": "encoder_latency_ms", "prefill": "prefill_latency_ms"}
    shares = {stage: found[name].dense / total for stage, name in names.items() if name in found}
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

    def sentence(self) -> str:
        """What a report says of it."""
        pairs = [f"{equal} of {limit}" for equal, limit in zip(self.equal_tokens, self.compared_tokens, strict=True)]
        return (
            "Drift, row by row: KL of the first token, dense from pruned, "
            f"{', '.join(map(number, self.first_token_kl[:SHOWN_ROWS]))} nats; greedy tokens equal before the first "
            f"difference: {', '.join(pairs[:SHOWN_ROWS])}."
        )


def drift(dense: Inspection, pruned: Inspection, *, eos: int | list[int] | None = None) -> Drift:
    """Compare the answers of two runs on the same inputs; `eos` are the ids that end a sequence."""
    distributions = [Categorical(logits=side.first_logits.double()) for side in (dense, pruned)]
    kl = kl_divergence(*distributions).clamp(min=0.0)
    stops = eos if isinstance(eos, list) else [eos]
    equal, compared = [], []
    for expected, actual in zip(dense.new_ids.tolist(), pruned.new_ids.tolist(), strict=True):
        limit = next((place for place, token in enumerate(expected, start=1) if token in stops), len(expected))
        compared.append(limit)
        equal.append(next((place for place in range(limit) if expected[place] != actual[place]), limit))
    return Drift(tuple(kl.tolist()), tuple(equal), tuple(compared))


def agreement(dense: ForwardInspection, pruned: ForwardInspection) -> list[str]:
    """How far the outputs of two forwards on the same inputs agree, as sentences."""
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
