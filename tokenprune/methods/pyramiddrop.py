"""PyramidDrop: drop a share of the visual tokens at the end of each of a few stages (Xing et al., CVPR 2025, arXiv
2410.17247)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from tokenprune import ops
from tokenprune.errors import OptionError
from tokenprune.methods.base import Method
from tokenprune.reduction import Keep
from tokenprune.schedule import check_keep
from tokenprune.signals import Budget, LayerSignals, Probe, Stage


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Method):
    """The decoder's layers are divided into stages; after each but the last, `keep` of the tokens so far go on.

    Ranked by the attention that the last token of the prompt pays them in the last layer of the stage, on average over
    the heads (section 3.2 of the paper, which computes that attention anew; here it is the layer's own).

    Args:
        keep: fraction of the visual tokens of a row that goes from one stage to the next, in (0, 1].
        stages: where all stages but the last end: floats in (0, 1) relative to the decoder's depth, or ints = number of
            layers before the cut; ascending. The paper: a quarter, a half, three quarters.

    Raises:
        OptionError: an option is out of range.
    """

    name: ClassVar[str] = "pyramiddrop"

    keep: float | int | str = 0.5
    stages: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not isinstance(self.keep, float) and self.keep != 1:
            raise OptionError(
                f"keep of pyramiddrop goes from stage to stage and must be a float in (0, 1], got {self.keep!r}"
            )
        ends = list(self.stages) if isinstance(self.stages, tuple | list) else []
        depths = all(isinstance(end, float) and 0 < end < 1 for end in ends)
        indices = all(isinstance(end, int) and not isinstance(end, bool) and end >= 1 for end in ends)
        if not ends or not (depths or indices) or sorted(set(ends)) != ends:
            raise OptionError(
                "stages must be ascending floats in (0, 1) (relative to the depth) or ascending ints of at least 1 "
                f"(layers before the cut), got {self.stages!r}"
            )

    def schedule(self, n_layers: int) -> tuple[Stage, ...]:
        """One cut at the end of each stage but the last.

        Raises:
            OptionError: the stages do not fit a decoder of this depth.
        """
        ends = [end if isinstance(end, int) else max(1, math.floor(end * n_layers + 0.5)) for end in self.stages]
        if len(set(ends)) < len(ends) or ends[-1] >= n_layers:
            raise OptionError(
                f"stages={self.stages!r} end after {', '.join(map(str, ends))} layers, which does not fit a decoder of "
                f"{n_layers} layers: different numbers from 1 to {n_layers - 1} would"
            )
        assert not isinstance(self.keep, str)
        return tuple(Stage(end - 1, float(self.keep) ** i) for i, end in enumerate(ends, 1))

    @property
    def probe(self) -> Probe | None:
        """Attention from the last token."""
        return Probe("last_query")

    def llm_layer(self, signals: LayerSignals, budget: Budget) -> Keep:
        """The most attended of the tokens of `signals.importance` `[R, N]`."""
        return Keep(ops.top_k_select(signals.importance, k=budget.high))
