"""Methods as adapters see them: with shares turned into counts, and with their answers checked."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import InputError
from tokenprune.methods.base import Method
from tokenprune.reduction import Keep, Merge, Reduction
from tokenprune.schedule import share
from tokenprune.signals import AttentionPlan, Budget, CachePlan, LayerSignals, Probe, Signals, Stage, TextGuard


@dataclass(frozen=True)
class CheckedReducer:
    """A method at one site, with its `keep` turned into counts and its answer checked."""

    method: Method
    site: str

    @property
    def name(self) -> str:
        return self.method.name or type(self.method).__name__

    @property
    def biased(self) -> bool:
        return self.method.biased

    def __call__(self, signals: Signals) -> Reduction:
        """What the method keeps, on the CPU, or how it merges.

        Raises:
            InputError: the method did not answer with distinct ascending positions within its budget.
        """
        n_rows, n_tokens = signals.features.shape[:2]
        budget = self.method.budget(n_tokens + signals.n_hidden)
        budget = Budget(min(budget.low, n_tokens), min(budget.high, n_tokens))
        answer = getattr(self.method, self.site)(signals, budget)
        due = f"{n_rows} rows of {budget.low} to {budget.high} of {n_tokens} tokens were due"
        who = f"method {self.name!r} at site {self.site!r} returned"
        if not isinstance(answer, Keep | Merge):
            raise InputError(f"{who} {type(answer).__name__}; a Keep or a Merge with {due}")
        index, valid = answer.index.cpu(), None if answer.valid is None else answer.valid.cpu()
        fits = index.ndim == 2 and index.shape[0] == n_rows and budget.low <= index.shape[1] <= budget.high
        if not fits or (valid is not None and valid.shape != index.shape):
            raise InputError(f"{who} an index of shape {tuple(index.shape)}; {due}, and valid of that shape or None")
        if index.dtype != torch.int64:
            raise InputError(f"{who} an index of {index.dtype}; int64 positions were due")
        for row, kept in enumerate(index):
            kept = kept if valid is None else kept[valid[row]]
            inside = len(kept) >= budget.low and int(kept[0]) >= 0 and int(kept[-1]) < n_tokens
            if not inside or not bool((kept.diff() > 0).all()):
                raise InputError(
                    f"{who} {kept.tolist()} for image {row}; {budget.low} to {budget.high} distinct ascending "
                    f"positions below {n_tokens} were due"
                )
        if isinstance(answer, Keep):
            return Keep(index, valid, answer.radius)
        if answer.assign.shape != (n_rows, n_tokens) or not torch.equal(
            answer.assign.cpu().gather(1, index), torch.ones_like(index).cumsum(1) - 1
        ):
            raise InputError(f"{who} a Merge whose groups do not stand at tokens of their own; {due}")
        return answer


@dataclass(frozen=True)
class CheckedLayerReducer:
    """A method after decoder layers, with its answer checked."""

    method: Method

    @property
    def name(self) -> str:
        return self.method.name or type(self.method).__name__

    @property
    def probe(self) -> Probe | None:
        return self.method.probe

    @property
    def text(self) -> TextGuard | None:
        return self.method.text

    def schedule(self, n_layers: int) -> tuple[Stage, ...]:
        return self.method.schedule(n_layers)

    def attention_plan(self, n_layers: int) -> AttentionPlan | None:
        return self.method.attention_plan(n_layers)

    def cache_plan(self, n_layers: int) -> CachePlan | None:
        return self.method.cache_plan(n_layers)

    def count(self, stage: Stage, n_tokens: int) -> int:
        return share(stage.keep, n_tokens, round_down=stage.round_down)

    def __call__(self, signals: LayerSignals, *, n_keep: int) -> Tensor:
        """Positions that go on, `[R, n_keep]` int64.

        Raises:
            InputError: the method did not answer with as many distinct ascending positions.
        """
        n_rows, n_tokens = signals.importance.shape
        keep = self.method.llm_layer(signals, Budget(n_keep, n_keep))  # type: ignore[attr-defined]
        due = f"{n_rows} rows of {n_keep} distinct ascending positions below {n_tokens} were due"
        who = f"method {self.name!r} returned after layer {signals.layer}"
        if not isinstance(keep, Keep) or keep.index.shape != (n_rows, n_keep) or keep.index.dtype != torch.int64:
            raise InputError(f"{who} something other than a Keep of shape {(n_rows, n_keep)}; {due}")
        index = keep.index.cpu()
        inside = bool(((index >= 0) & (index < n_tokens)).all())
        if not inside or not bool((index.diff(dim=1) > 0).all()):
            raise InputError(f"{who} {index.tolist()}; {due}")
        return index
