"""Random tokens: the baseline that every selection has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenprune.methods.base import Method
from tokenprune.methods.options import must_be, option
from tokenprune.reduction import Keep
from tokenprune.schedule import is_int
from tokenprune.signals import Budget, Signals


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Keep tokens drawn at random, without looking at them.

    The draw for an image depends on `seed`, the number of its tokens and the ordinal of the image within its row, so
    that a row gives the same in any batch and on any device.

    Args:
        keep: see :class:`~tokenprune.methods.base.Method`.
        seed: seed of the draws, an int from 0 to 2^63 - 1.

    Raises:
        OptionError: `keep` or `seed` is out of range.
    """

    name: ClassVar[str] = "random"

    seed: int = option(0, must_be("an int from 0 to 2^63 - 1", lambda seed: is_int(seed) and 0 <= seed < 2**63))

    def before_llm(self, signals: Signals, budget: Budget) -> Keep:
        """Draw `budget.high` of N tokens for each of the B images."""
        n_tokens = signals.features.shape[1]
        rows = []
        for ordinal in signals.ids:
            generator = torch.Generator(device="cpu").manual_seed((self.seed * 1_000_003 + ordinal) % 2**63)
            order = torch.randperm(n_tokens, generator=generator, dtype=torch.int64, device="cpu")
            rows.append(order[: budget.high].sort().values)
        return Keep(torch.stack(rows).to(signals.features.device))
