"""Bytes of keys and values that decoding steps read: added up where they are counted, read when somebody asks."""

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


@dataclass
class Reads:
    """Sums over layers, rows and steps.

    Attributes:
        sums: fp64 sums of bytes (dense, tokens, heads, values, read, as in :class:`tokenprune.signals.Traffic`) and of
            shares of heads that read the low bits, on the device that counted them.
        steps: attentions of one row that were counted.
        open: what was read in the forward that runs.
    """

    sums: Tensor | None = None
    steps: int = 0
    open: list[Read] = field(default_factory=list)

    def close(self) -> "Reads":
        """The sums with what was read in the forward that ends."""
        if not self.open:
            return self
        steps = [read.step for read in self.open]
        device = steps[0].output.device
        tokens, keys, values = (
            torch.cat([count.to(device) for count in counts], dim=1).double()
            for counts in zip(*((step.dense_bytes, step.key_bytes, step.value_bytes) for step in steps), strict=True)
        )
        heads = tokens * (keys > 0)
        bits = keys / (heads / 2).clamp(min=1)  # share of the bits of a key, and of a value, that were read
        found = [tokens, heads, heads / 2 + values / bits.where(bits > 0, torch.ones_like(bits)), keys + values]
        dense = sum(read.n_dense * _bytes_per_key(read.step) for read in self.open)
        low = sum(read.step.recomputed.sum().to(device) / read.n_heads for read in self.open)
        sums = torch.stack([x.sum() for x in found])
        ends = [torch.as_tensor(x, dtype=torch.float64, device=device).view(1) for x in (dense, low)]
        sums = torch.cat([ends[0], sums, ends[1]])
        earlier = 0.0 if self.sums is None else self.sums.to(device)
        return Reads(earlier + sums, self.steps + sum(len(step.output) for step in steps))

    def traffic(self) -> Traffic:
        """The sums so far. On a GPU this waits for them."""
        if self.sums is None:
            return Traffic()
        dense, tokens, heads, values, read, low = self.sums.tolist()
        return Traffic(dense, tokens, heads, values, read, self.steps, low / self.steps)


def _bytes_per_key(step: DecodedStep) -> int:
    """Bytes of one key and its value, over all KV heads."""
    return int(step.dense_bytes.shape[1] * 2 * step.output.shape[-1] * step.output.element_size())
