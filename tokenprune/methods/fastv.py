"""FastV: drop visual tokens once, after an early decoder layer (Chen et al., ECCV 2024, arXiv 2403.06764)."""

from dataclasses import dataclass
from typing import ClassVar

from tokenprune import ops
from tokenprune.errors import OptionError
from tokenprune.methods.base import Method
from tokenprune.methods.options import at_least, option
from tokenprune.reduction import Keep
from tokenprune.signals import Budget, LayerSignals, Stage


@dataclass(frozen=True, kw_only=True)
class FastV(Method):
    """Drop visual tokens once, after the first `layer` decoder layers (section 4 of the paper).

    Kept are those that receive most attention from the last token of the prompt in the last of these layers, on average
    over the heads. The visual tokens of a row are ranked together.

    Args:
        layer: how many layers see all tokens, at least 1 (the paper's K).
        keep: float in (0, 1] = fraction of the visual tokens of a row, int >= 1 = tokens of a row.

    Raises:
        OptionError: an option is out of range.
    """

    name: ClassVar[str] = "fastv"

    keep: float | int | str = 0.5
    layer: int = option(2, at_least(1))

    def schedule(self, n_layers: int) -> tuple[Stage, ...]:
        """One stage.

        Raises:
            OptionError: the decoder has no layer after it.
        """
        if self.layer >= n_layers:
            raise OptionError(
                f"layer={self.layer} leaves no layer that sees fewer tokens in a decoder of {n_layers} layers; give at "
                f"most {n_layers - 1}"
            )
        assert not isinstance(self.keep, str)
        return (Stage(self.layer - 1, self.keep),)

    def llm_layer(self, signals: LayerSignals, budget: Budget) -> Keep:
        """The most attended of the tokens of `signals.importance` `[R, N]`."""
        return Keep(ops.top_k_select(signals.importance, k=budget.high))
