"""Merging inside the blocks of a vision transformer (ToMe, arXiv 2210.09461)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenprune import ops
from tokenprune.errors import OptionError
from tokenprune.methods.base import Method
from tokenprune.ops.equal import equal_tokens
from tokenprune.reduction import Keep, Merge, pack
from tokenprune.schedule import Removal, check_keep, check_removal, removals
from tokenprune.signals import BlockSignals, Budget, Signals


@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """In every block, between attention and MLP, merge the tokens whose keys are most alike.

    Tokens at even positions look among those at odd positions for the one whose head-averaged key has the highest
    cosine; the `r` best pairs are merged into means weighted by how many tokens each stands for. Class, distillation
    and register tokens are left alone.

    Inside a multimodal model, of the visual tokens that are equal because their patches were merged, only the one in
    their middle goes on to the decoder.

    Args:
        keep: float in (0, 1] = fraction of the patches that is left after the last block, int >= 1 = patches left; or
        r: patches removed per block: an int, a pair of an int and an inflection in [-1, 1] (-1: from twice as many
            down to none), or a list with a number for each block. No block removes more than half.
        proportional: add the logarithm of a token's size to its attention logits, so that a merged token counts as
            much as those it stands for.
        restore: give what leaves the encoder all patches back, each with the value of its merged token. Where an
            encoder pools all patches, they then count by their sizes; False hands on the merged tokens.
        backend: `"auto"`, `"torch"` or `"triton"`, see :mod:`tokenprune.ops`.

    Raises:
        OptionError: not exactly one of `keep` and `r` is given, or it is out of range.
    """

    name: ClassVar[str] = "tome"

    keep: float | int | None = None  # type: ignore[assignment]
    r: Removal | None = None
    proportional: bool = True
    restore: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.r is None):
            raise OptionError(
                "give either r, patches removed per block (r=8), or keep, what is left after the last block "
                f"(keep=0.5); got r={self.r!r} and keep={self.keep!r}"
            )
        if self.r is None:
            check_keep(self.keep)
        else:
            check_removal(self.r)
        for name in ("proportional", "restore"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.backend not in ("auto", "torch", "triton"):
            raise OptionError(f"backend must be 'auto', 'torch' or 'triton', got {self.backend!r}")

    def removals(self, *, n_layers: int, n_tokens: int) -> tuple[int, ...]:
        """How many of an image's `n_tokens` patches each of the `n_layers` blocks removes.

        Raises:
            OptionError: the options do not fit such an encoder.
        """
        if self.r is not None:
            return removals(self.r, n_layers=n_layers, n_tokens=n_tokens)
        return super().removals(n_layers=n_layers, n_tokens=n_tokens)

    def encoder_block(self, signals: BlockSignals, budget: Budget) -> Merge:
        """Merge the tokens behind `signals.keys` `[B, N, K]` into `budget.high` ones."""
        r = signals.keys.shape[1] - budget.high
        found = ops.bipartite_match(signals.keys, r=r, protected=signals.protected, backend=self.backend)
        return Merge(found.index, found.assign, signals.sizes)

    def budget(self, n_tokens: int) -> Budget:
        """Before the decoder goes on what is left of the patches, however many that are."""
        return Budget(1, n_tokens)

    def before_llm(self, signals: Signals, budget: Budget) -> Keep:
        """Keep one of the tokens of `signals.features` `[B, N, D]` that are equal bit for bit."""
        middle = equal_tokens(signals.features).middle
        stays = middle == torch.arange(middle.shape[1], dtype=torch.int64, device=middle.device)
        return pack(stays)
