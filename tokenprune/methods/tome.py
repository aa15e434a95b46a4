"""Merging inside the blocks of a vision transformer (ToMe, arXiv 2210.09461)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenprune import ops
from tokenprune.errors import OptionError
from tokenprune.methods.base import Method
from tokenprune.methods.options import backend_name, keep_check, option, or_none, true_or_false
from tokenprune.ops.equal import equal_tokens
from tokenprune.reduction import Keep, Merge, gather, pack
from tokenprune.schedule import Removal, check_removal, removals
from tokenprune.signals import BlockSignals, Budget, Signals


@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """In every block, between attention and MLP, merge the tokens whose keys are most alike.

    Tokens at even positions look among those at odd positions for the one whose head-averaged key has the highest
    cosine; the `r` best pairs are merged into means weighted by how many tokens each represents. Class, distillation
    and register tokens are left alone. Ties go to the first position.

    Positions are those of the paper's code (appendix D): each merging leaves the tokens at even positions before those
    at odd ones, class token and the like still first, and the next block splits that order. (Where there is no class
    token, the release moreover sorts those left at even positions by similarity; the paper and this do not.) What a
    block hands on is in spatial order all the same, a merged token at the place of the one at the odd position: blocks
    do not depend on it, and what reads the patches in their places is right.

    Inside a multimodal model, of the visual tokens that are equal because their patches were merged, only the one in
    their middle is kept for the decoder.

    Args:
        keep: float in (0, 1] = fraction of the patches that is left after the last block, int >= 1 = patches left; or
        r: patches removed per block: an int, a pair of an int and an inflection in [-1, 1] (-1: from twice as many
            down to none), or a list with a number for each block. No block removes more than half of the patches that
            reach it, as in the paper's release, so that one is left however large the numbers are.
        proportional: add the logarithm of a token's size to its attention logits, so that a merged token counts as
            much as those it represents.
        restore: give what leaves the encoder all patches back, each with the value of its merged token. Where an
            encoder pools all patches, they then count by their sizes; False hands on the merged tokens.
        backend: `"auto"`, `"torch"` or `"triton"`, see :mod:`tokenprune.ops`.

    Raises:
        OptionError: not exactly one of `keep` and `r` is given, or it is out of range.
    """

    name: ClassVar[str] = "tome"

    keep: float | int | None = option(None, or_none(keep_check))  # type: ignore[assignment]
    r: Removal | None = None
    proportional: bool = option(True, true_or_false)
    restore: bool = option(True, true_or_false)
    backend: str = option("auto", backend_name)

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.r is None):
            raise OptionError(
                "give either r, patches removed per block (r=8), or keep, what is left after the last block "
                f"(keep=0.5); got r={self.r!r} and keep={self.keep!r}"
            )
        super().__post_init__()
        if self.r is not None:
            check_removal(self.r)

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
        n_tokens, order = signals.keys.shape[1], signals.order
        keys = signals.keys if order is None else gather(signals.keys, order)
        found = ops.bipartite_match(keys, r=n_tokens - budget.high, protected=signals.protected, backend=self.backend)
        if order is None:
            return Merge(found.index, found.assign, signals.sizes)
        index, groups = gather(order, found.index).sort(dim=1)  # back to spatial order
        assign = torch.empty_like(order).scatter_(1, order, gather(groups.argsort(dim=1), found.assign))
        return Merge(index, assign, signals.sizes)

    def budget(self, n_tokens: int) -> Budget:
        """Before the decoder all merged tokens are kept, however many there are."""
        return Budget(1, n_tokens)

    def before_llm(self, signals: Signals, budget: Budget) -> Keep:
        """Keep one of the tokens of `signals.features` `[B, N, D]` that are equal bit for bit."""
        middle = equal_tokens(signals.features).middle
        stays = middle == torch.arange(middle.shape[1], dtype=torch.int64, device=middle.device)
        return pack(stays)
