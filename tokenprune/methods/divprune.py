"""DivPrune: keep the visual tokens that differ most from each other (Alvar et al., CVPR 2025, arXiv 2503.02175)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenprune import ops
from tokenprune.errors import OptionError
from tokenprune.methods.base import Method
from tokenprune.reduction import Keep
from tokenprune.schedule import check_keep, count
from tokenprune.signals import Budget, Signals


@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """Max-min diversity selection before the language model (section 3 of the paper).

    The first pick is the token whose nearest other token is farthest in cosine distance; then, repeatedly, the token
    that is farthest from all chosen ones. Ties go to the lowest index. A greedy k-centre: no other choice of
    as many tokens reaches less than a quarter of the radius in the trace (half of it in the chord distance, a metric).

    Departures from the authors' release: a fraction `keep` is rounded half up and keeps one token at least; cosines are
    summed in fp32 whatever the model's dtype; and as many distinct tokens are chosen as are due, where the release can
    choose a token again that has an equal one.

    Args:
        keep: float in (0, 1] = fraction of each image (frame), int = tokens of each image (frame), or `"auto"`: as few
            as needed for every dropped token to lie within cosine distance `radius` of a kept one.
        radius: cosine distance for `keep="auto"`, in [0, 2].
        min_keep: least to keep with `keep="auto"`, as a fraction or a count.
        max_keep: most to keep with `keep="auto"`, as a fraction or a count; it wins over `radius`.
        backend: `"auto"`, `"torch"` or `"triton"`, as in :mod:`tokenprune.ops`.

    Raises:
        OptionError: an option is out of range, or `radius`, `min_keep` or `max_keep` is given without `keep="auto"`.
    """

    name: ClassVar[str] = "divprune"

    radius: float | None = None
    min_keep: float | int | None = None
    max_keep: float | int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "torch", "triton"):
            raise OptionError(f"backend must be 'auto', 'torch' or 'triton', got {self.backend!r}")
        if isinstance(self.keep, str) and self.keep != "auto":
            raise OptionError(
                "keep must be a float in (0, 1] (a fraction), an int of at least 1 (tokens per image) or the word "
                f'"auto", got {self.keep!r}'
            )
        if self.keep != "auto":
            check_keep(self.keep)
            for name in ("radius", "min_keep", "max_keep"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f'{name} goes with keep="auto" only, got {name}={getattr(self, name)!r} and keep={self.keep!r}'
                    )
            return
        number = isinstance(self.radius, int | float) and not isinstance(self.radius, bool)
        if self.radius is None or not number or not 0.0 <= self.radius <= 2.0:
            raise OptionError(f'keep="auto" needs radius, a cosine distance in [0, 2], got {self.radius!r}')
        for name in ("min_keep", "max_keep"):
            if getattr(self, name) is not None:
                check_keep(getattr(self, name), name=name)

    def budget(self, n_tokens: int) -> Budget:
        """How many of the `n_tokens` tokens of an image may go on."""
        if self.keep != "auto":
            return super().budget(n_tokens)
        high = count(1.0 if self.max_keep is None else self.max_keep, n_tokens)
        return Budget(min(high, count(1 if self.min_keep is None else self.min_keep, n_tokens)), high)

    def before_llm(self, signals: Signals, budget: Budget) -> Keep:
        """Select tokens of `signals.features` `[B, N, D]`; the radius reached is in the result."""
        features = signals.features
        if self.radius is None:
            chosen = ops.max_min_select(features, k=budget.high, backend=self.backend)
            return Keep(chosen.index, radius=chosen.radius)
        cover = ops.max_min_cover(
            features, radius=self.radius, min_k=budget.low, max_k=budget.high, backend=self.backend
        )
        valid = cover.order >= 0
        # In ascending order, with the slots that only fill a short row up at its end.
        index = torch.where(valid, cover.order, features.shape[1]).sort(dim=1).values
        return Keep(index.masked_fill(index == features.shape[1], 0), index < features.shape[1], cover.radius)
