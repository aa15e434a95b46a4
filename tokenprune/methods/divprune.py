"""DivPrune: keep the visual tokens that differ most from each other (Alvar et al., CVPR 2025, arXiv 2503.02175)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tokenprune import ops
from tokenprune.errors import OptionError
from tokenprune.methods.base import Method
from tokenprune.methods.options import backend_name, keep_check, must_be, option, or_none
from tokenprune.reduction import Keep
from tokenprune.schedule import count, is_number
from tokenprune.signals import Budget, Signals


def _keep_or_auto(name: str, keep: Any) -> None:
    """The check of what is kept: a fraction, a count or `"auto"`."""
    if isinstance(keep, str) and keep != "auto":
        raise OptionError(
            "keep must be a float in (0, 1] (a fraction), an int of at least 1 (tokens per image) or the word "
            f'"auto", got {keep!r}'
        )
    if keep != "auto":
        keep_check(name, keep)


_DISTANCE = must_be("a cosine distance in [0, 2]", lambda value: is_number(value) and 0 <= value <= 2)


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

    keep: float | int | str = option(0.25, _keep_or_auto)
    radius: float | None = option(None, or_none(_DISTANCE))
    min_keep: float | int | None = option(None, or_none(keep_check))
    max_keep: float | int | None = option(None, or_none(keep_check))
    backend: str = option("auto", backend_name)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep == "auto" and self.radius is None:
            raise OptionError('keep="auto" needs radius, a cosine distance in [0, 2], got None')
        for name in ("radius", "min_keep", "max_keep"):
            if self.keep != "auto" and (value := getattr(self, name)) is not None:
                raise OptionError(f'{name} goes with keep="auto" only, got {name}={value!r} and keep={self.keep!r}')

    def budget(self, n_tokens: int) -> Budget:
        """How many of the `n_tokens` tokens of an image are to be kept."""
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
        # In ascending order, padding slots of a short row at its end.
        index = torch.where(valid, cover.order, features.shape[1]).sort(dim=1).values
        return Keep(index.masked_fill(index == features.shape[1], 0), index < features.shape[1], cover.radius)
