"""Evenly spaced tokens: what a smaller token grid over the same image would look like."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenprune.methods.base import Method
from tokenprune.reduction import Keep
from tokenprune.signals import Budget, Signals


def _spaced(n_out: int, n_in: int) -> torch.Tensor:
    """`n_out` distinct positions out of `n_in`, each at the middle of its share, `[n_out]` int64."""
    return (torch.arange(n_out, dtype=torch.int64, device="cpu") * 2 + 1) * n_in // (2 * n_out)


def _on_grid(n_keep: int, grid: tuple[int, int]) -> torch.Tensor:
    """`n_keep` tokens of a grid of h x w in evenly spaced rows, the rows as evenly filled as possible, `[n_keep]`
    int64."""
    height, width = grid
    n_rows = min(height, n_keep, max(math.ceil(n_keep / width), round(math.sqrt(n_keep * height / width))))
    bounds = [row * n_keep // n_rows for row in range(n_rows + 1)]
    lines = [
        int(line) * width + _spaced(bounds[row + 1] - bounds[row], width)
        for row, line in enumerate(_spaced(n_rows, height))
    ]
    return torch.cat(lines)


@dataclass(frozen=True, kw_only=True)
class Uniform(Method):
    """Sub-sample the token grid evenly; where the tokens of an image are not one grid, every n-th token of the
    sequence.

    Args:
        keep: see :class:`~tokenprune.methods.base.Method`.
    """

    name: ClassVar[str] = "uniform"

    def before_llm(self, signals: Signals, budget: Budget) -> Keep:
        """Choose `budget.high` of N positions, the same for each of the B images."""
        n_images, n_tokens = signals.features.shape[:2]
        chosen = _spaced(budget.high, n_tokens) if signals.grid is None else _on_grid(budget.high, signals.grid)
        return Keep(chosen.to(signals.features.device).expand(n_images, -1))
