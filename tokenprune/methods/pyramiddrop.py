"""PyramidDrop: drop a share of the visual tokens at the end of each of a few stages (Xing et al., CVPR 2025, arXiv
2410.17247)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenprune import ops
from tokenprune.errors import OptionError
from tokenprune.methods.base import Method
from tokenprune.methods.options import layers_or_depths, must_be, option
from tokenprune.reduction import Keep
from tokenprune.schedule import is_int, is_number
from tokenprune.signals import Budget, LayerSignals, Stage


def _are_stages(stages: Any) -> bool:
    """Whether `stages` are ascending depths or ascending numbers of layers."""
    ends = layers_or_depths(stages)
    if not ends or sorted(set(ends)) != ends:
        return False
    return bool(ends[0] > 0 and (is_int(ends[0]) or ends[-1] < 1))


_KEEP = must_be(
    "a float in (0, 1], the fraction kept from stage to stage", lambda keep: is_number(keep) and 0 < keep <= 1
)
_STAGES = must_be(
    "ascending floats in (0, 1) (relative to the depth) or ascending ints of at least 1 (layers before the cut)",
    _are_stages,
)


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Method):
    """The decoder's layers are divided into stages; after each but the last, `keep` of the tokens so far are kept.

    Ranked by the attention that the last token of the prompt pays them in the last layer of the stage, on average over
    the heads (section 3.2 of the paper, which computes that attention anew; here it is the layer's own).

    Args:
        keep: fraction of the visual tokens of a row that is kept from one stage to the next, in (0, 1].
        stages: where all stages but the last end: floats in (0, 1) relative to the decoder's depth, or ints = number of
            layers before the cut; ascending. The paper: a quarter, a half, three quarters.

    Raises:
        OptionError: an option is out of range.
    """

    name: ClassVar[str] = "pyramiddrop"

    keep: float | int | str = option(0.5, _KEEP)
    stages: tuple[float, ...] = option((0.25, 0.5, 0.75), _STAGES)

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

    def llm_layer(self, signals: LayerSignals, budget: Budget) -> Keep:
        """The most attended of the tokens of `signals.importance` `[R, N]`."""
        return Keep(ops.top_k_select(signals.importance, k=budget.high))
