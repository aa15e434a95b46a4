"""Bytes of keys and values that decoding steps read: added up where they are counted, read when somebody asks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.ops import DecodedStep
from tokenprune.signals import Traffic


class Read(NamedTuple):
    """One layer of one decoding step.

    Attributes:
        step: what its attention found, with the bytes that it read.
        n_dense: keys that the unpruned model would have seen, over all rows.
        n_heads: query heads that were kept.
    """

    step: DecodedStep
    n_dense: int | Tensor
    n_heads: int


class WholeRead(NamedTuple):
    """One layer of one decoding step that read whole keys and values of some KV heads.

    Attributes:
        dense: bytes that the unpruned model would have read, over all rows.
        tokens: without the dropped tokens.
        heads: without the KV heads that no kept head uses, too: what was read.
        n_rows: rows of the batch.
    """

    dense: int | Tensor
    tokens: int | Tensor
    heads: int | Tensor
    n_rows: int


@dataclass
class Reads:
    """Sums over layers, rows and steps.

    Attributes:
        sums: fp64 sums of bytes (dense, tokens, heads, values, read, as in :class:`tokenprune.signals.Traffic`) and of
            shares of heads that read the low bits, on the device that counted them.
        steps: attentions of one row that were counted.
        open: what was read in part in the forward that runs.
        whole: what was read whole in the forward that runs.
    """

    sums: Tensor | None = None
    steps: int = 0
    open: list[Read] = field(default_factory=list)
    whole: list[WholeRead] = field(default_factory=list)

    def close(self) -> "Reads":
        """The sums with what was read in the forward that ends."""
        sums, steps = self.sums, self.steps
        if self.open:
            found = self._sums_in_part()
            sums = found if sums is None else sums.to(found.device) + found
            steps += sum(len(read.step.output) for read in self.open)
        if self.whole:
            dense, tokens, heads, n_rows = map(sum, zip(*self.whole, strict=True))
            counts = (dense, tokens, heads, heads, heads, 0)
            found = torch.stack([torch.as_tensor(count, dtype=torch.float64, device="cpu") for count in counts])
            sums = found if sums is None else sums.to(found.device) + found
            steps += n_rows
        return Reads(sums, steps)

    def _sums_in_part(self) -> Tensor:
        """The sums of what was read in part, `[6]` fp64."""
        steps = [read.step for read in self.open]
        device = steps[0].output.device

        def joined(counts: Iterable[Tensor]) -> Tensor:
            return torch.cat([count.to(device) for count in counts], dim=1).double()

        tokens, keys = joined(step.dense_bytes for step in steps), joined(step.key_bytes for step in steps)
        heads = tokens * (keys > 0)
        bits = keys / (heads / 2).clamp(min=1)  # share of the bits of a key, and of a value, that were read
        values = joined(step.value_bytes for step in steps)
        shares = [1 / read.n_heads for read in self.open for _ in range(read.step.recomputed.shape[1])]
        counted = (
            tokens,
            heads,
            heads / 2 + values / bits.where(bits > 0, torch.ones_like(bits)),
            keys + values,
            joined(step.recomputed for step in steps) * torch.tensor(shares, dtype=torch.float64, device=device),
        )
        dense = sum(read.n_dense * _bytes_per_key(read.step) for read in self.open)
        return torch.stack(
            [torch.as_tensor(dense, dtype=torch.float64, device=device), *(count.sum() for count in counted)]
        )

    def traffic(self) -> Traffic:
        """The sums so far. On a GPU this waits for them."""
        if self.sums is None:
            return Traffic()
        dense, tokens, heads, values, read, low = self.sums.tolist()
        return Traffic(dense, tokens, heads, values, read, self.steps, low / self.steps)


def _bytes_per_key(step: DecodedStep) -> int:
    """Bytes of one key and its value, over all KV heads."""
    return int(step.dense_bytes.shape[1] * 2 * step.output.shape[-1] * step.output.element_size())
