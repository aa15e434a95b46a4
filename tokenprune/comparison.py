"""Dense against pruned: what runs of both sides say about cost and about answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tokenprune.generation import Generation, Inspection
from tokenprune.measure import Timing


@dataclass(frozen=True)
class Cost:
    """One quantity, dense against pruned.

    Attributes:
        name: what was measured, its unit last (`prefill_latency_ms`).
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
        """Dense over pruned."""
        return self.dense / self.pruned if self.pruned else None


def latencies(timed: Mapping[str, Sequence[Generation]]) -> list[Cost]:
    """Latencies of the timed runs of the sides "dense" and "pruned"."""
    names = {
        "prefill_latency_ms": "prefill_ms",
        "encoder_latency_ms": "encoder_ms",
        "decoder_prefill_latency_ms": "decoder_ms",
        "decode_latency_ms": "decode_ms",
        "total_latency_ms": "total_ms",
    }
    costs = []
    for name, attribute in names.items():
        dense, pruned = ([getattr(run, attribute) for run in timed[side]] for side in ("dense", "pruned"))
        if None not in dense and None not in pruned:
            sides = Timing(tuple(dense)), Timing(tuple(pruned))
            ranges = [(side.quantile(0.2), side.quantile(0.8)) for side in sides]
            costs.append(Cost(name, sides[0].median, sides[1].median, *ranges))
    return costs


def amounts(dense: Inspection, pruned: Inspection) -> list[Cost]:
    """Memory and arithmetic of two runs on the same inputs."""
    costs = [Cost("peak_mib", dense.peak_mib, pruned.peak_mib)]
    if dense.kv_mib is not None and pruned.kv_mib is not None:
        costs.append(Cost("kv_mib", dense.kv_mib, pruned.kv_mib))
    costs.append(Cost("prefill_flops_g", dense.prefill_flops_g, pruned.prefill_flops_g))
    if dense.new_ids.shape[1] > 1:
        costs.append(Cost("total_flops_g", dense.total_flops_g, pruned.total_flops_g))
    return costs


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
    ends = torch.isin(dense.new_ids, torch.tensor([] if eos is None else eos, dtype=dense.new_ids.dtype))
    unequal = dense.new_ids != pruned.new_ids
    compared = [_first(row, len(row) - 1) + 1 for row in ends.tolist()]
    equal = [min(_first(row, len(row)), limit) for row, limit in zip(unequal.tolist(), compared, strict=True)]
    return Drift(tuple(0.0 if value < 0 else value for value in kl.tolist()), tuple(equal), tuple(compared))


def _first(flags: list[bool], otherwise: int) -> int:
    return flags.index(True) if True in flags else otherwise
