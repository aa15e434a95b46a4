"""What a KV cache that is shorter than the sequence it represents knows of itself.

After pruning, a cache holds fewer slots than the sequence has tokens. Everything outside the decoder (``generate``, a
manual loop, the model's own position and mask code) counts in tokens of the unpruned sequence; everything
inside the decoder counts slots. The cache object bridges the two (:mod:`tokenprune.upstream.caches`), and the map
between them, a :class:`Ledger`, sits on it. So a second turn, chunked prefill, assisted decoding and manual loops need
no code of their own.

Mask sizes are logical outside the decoder too, although physical ones would spare the decoder's masks a gather: so
every mask that is built above the decoder comes out as for the unpruned sequence, and one rule serves all families
(:mod:`tokenprune.decoder.masks`).
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.decode.traffic import Reads
from tokenprune.errors import InputError
from tokenprune.reduction import Keep
from tokenprune.signals import Probe
from tokenprune.upstream.caches import layers_of, slots_of, stored_length


@dataclass
class Slots:
    """Where the slots of some layers of a pruned cache stand in the unpruned sequence.

    Attributes:
        index: `[B, M]` int64, position in the unpruned sequence of each of the first M slots, -1 for a padding
            slot. Slots after the M-th stand at `slot + dropped`.
        dropped: how many more tokens than slots there are.
        has_padding_slots: whether there are padding slots.
        bias: `[B, M]` fp32, what attention adds to the logits of each of the first M slots (0 for later ones), or None.
    """

    index: Tensor
    dropped: int
    has_padding_slots: bool = False
    bias: Tensor | None = None

    @property
    def differ(self) -> bool:
        """Whether the slots are not simply the tokens."""
        return self.dropped > 0 or self.has_padding_slots or self.bias is not None

    def columns(self, sequence: Tensor) -> Tensor:
        """Position in the unpruned sequence of each slot, `[B, n - dropped]` int64, -1 for padding slots.

        Args:
            sequence: positions 0 to n - 1 of the unpruned sequence so far, `[n]` int64.
        """
        n_listed = self.index.shape[1]
        tail = sequence[n_listed + self.dropped :].to(self.index.device).expand(self.index.shape[0], -1)
        return torch.cat([self.index[:, : len(sequence) - self.dropped], tail], dim=1)

    def biases(self, *, n_slots: int) -> Tensor | None:
        """What attention adds to the logits of each of `n_slots` slots, `[B, n_slots]` fp32, or None."""
        if self.bias is None:
            return None
        bias = self.bias[:, :n_slots]
        return torch.nn.functional.pad(bias, (0, n_slots - bias.shape[1]))

    def cropped(self, *, n_slots: int) -> "Slots":
        """The first `n_slots` slots alone.

        Raises:
            InputError: a removed slot stands before a token that was pruned, so that removing slots would not remove
                tokens.
        """
        surplus = self.index.shape[1] - n_slots
        if surplus <= 0:
            return self
        end = self.index.shape[1] + self.dropped
        tail = torch.arange(end - surplus, end, dtype=torch.int64, device=self.index.device)
        removed, left = self.index[:, n_slots:], self.index[:, :n_slots]
        if not bool(((removed == tail) | (removed < 0)).all()) or bool((left >= end - surplus).any()):
            raise InputError(
                f"cropping the cache to {n_slots} slots would cut into pruned tokens; only what follows them can be "
                "cropped: the text after images or, where text is pruned too, the last keep_recent tokens; the draft "
                "length of an assistant must not exceed keep_recent"
            )
        return replace(self, index=self.index[:, :n_slots], bias=None if self.bias is None else self.bias[:, :n_slots])

    def take(self, rows: Tensor) -> "Slots":
        """The slots of some rows of the batch."""
        rows = rows.to(self.index.device)
        return replace(self, index=self.index[rows], bias=None if self.bias is None else self.bias[rows])


@dataclass
class Ledger:
    """What a pruned cache knows about itself.

    Attributes:
        starts: first layer of each part of the decoder whose layers hold the same tokens; the first one is 0.
        parts: the slots of each part.
        shift: `[B]` int64, by how much later positions are lowered (`positions="packed"`), or None.
        inside: whether the decoder's forward is running, so that lengths are asked for in slots.
        scores: `[B, n]` fp32, importance that the first n tokens of the unpruned sequence have gathered, by what asked
            for it.
        padding: `[B, n]` bool on the CPU, which of the first n tokens are no padding, where somebody wants to know.
        head_scores: `[B, H]` fp32, magnitudes that the outputs of the heads have gathered, likewise.
        reads: keys and values read so far, likewise.
        patterns: for each layer the heads that it kept in the last call, where they were the same in all rows.
        length: tokens of the unpruned sequence that went through the decoder; None where somebody else wrote states.
    """

    starts: tuple[int, ...]
    parts: tuple[Slots, ...]
    shift: Tensor | None = None
    inside: bool = False
    scores: dict[Probe, Tensor] = field(default_factory=dict)
    padding: Tensor | None = None
    head_scores: Tensor | None = None
    reads: Reads = field(default_factory=Reads)
    patterns: dict[int, tuple[int, ...]] = field(default_factory=dict)
    length: int | None = None

    def at(self, layer: int) -> Slots:
        """The slots of a layer."""
        return self.parts[bisect.bisect_right(self.starts, layer) - 1]

    @property
    def layered(self) -> bool:
        """Whether the layers hold different tokens."""
        return len(self.parts) > 1

    @property
    def differ(self) -> bool:
        """Whether the slots are not simply the tokens."""
        return any(slots.differ for slots in self.parts)

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return len(self.parts[0].index)

    def dropped_at(self, layer: int) -> int:
        """How many more tokens than slots there are in a layer."""
        return self.at(layer).dropped

    def crop(self, n_gone: int, physical: Any) -> Callable[[], None]:
        """What forgets the last `n_gone` tokens, to be called once they are out of the cache.

        Args:
            n_gone: how many.
            physical: gives the length of a layer in slots.

        Raises:
            InputError: that would cut into pruned tokens.
        """
        lengths = [int(physical(start)) for start in self.starts]
        parts = tuple(
            slots.cropped(n_slots=max(0, n_slots - n_gone)) for slots, n_slots in zip(self.parts, lengths, strict=True)
        )

        total = lengths[0] + self.parts[0].dropped - n_gone

        def finish() -> None:
            self.parts = parts
            self.padding = None if self.padding is None else self.padding[:, :total]
            self.scores = {probe: scores[:, :total] for probe, scores in self.scores.items()}
            self.length = None if self.length is None else self.length - n_gone

        return finish

    def renewed(self, ledger: "Ledger") -> "Ledger":
        """`ledger` with what this one knows of tokens and heads."""
        ledger.scores, ledger.padding = self.scores, self.padding
        ledger.head_scores, ledger.patterns = self.head_scores, self.patterns
        return ledger

    def take_rows(self, rows: Tensor) -> None:
        """Keep some rows of the batch."""
        self.parts = tuple(slots.take(rows) for slots in self.parts)
        self.shift = None if self.shift is None else self.shift[rows.to(self.shift.device)]
        self.padding = None if self.padding is None else self.padding[rows.cpu()]
        heads = self.head_scores
        self.head_scores = None if heads is None else heads[rows.to(heads.device)]
        self.scores = {probe: scores[rows.to(scores.device)] for probe, scores in self.scores.items()}

    def is_stale(self, cache: Any) -> bool:
        """Whether somebody has emptied `cache` since."""
        layers = layers_of(cache)
        return bool(self.length) and bool(layers) and all(stored_length(layer) == 0 for layer in layers)

    def check(self, cache: Any) -> None:
        """Check that the layers of `cache` are as long as is written down here.

        Raises:
            InputError: they are not: somebody has cut or lengthened them.
        """
        if self.length is None:
            return
        last, part = len(self.parts) - 1, 0
        for i, layer in enumerate(layers_of(cache)):
            if part < last and self.starts[part + 1] <= i:
                part += 1
            stored, wanted = stored_length(layer), self.length - self.parts[part].dropped
            if stored is not None and stored != wanted:
                raise InputError(
                    f"layer {i} of the pruned KV cache holds {stored} tokens, and {wanted} of the {self.length} tokens "
                    "of the sequence were stored there; shorten a pruned cache with cache.crop, and lengthen it by "
                    "calling the model, since slicing its tensors loses track of which tokens they are"
                )


def ledger_of(cache: Any) -> Ledger | None:
    """The ledger of a pruned cache, None for any other cache or for no cache."""
    ledger = slots_of(cache)
    return ledger if isinstance(ledger, Ledger) else None


def grown(slots: Slots | None, keep: Keep | None, bias: Tensor | None, *, past: int, rows: Tensor) -> Slots:
    """The slots of a layer after a forward that stored some of its tokens; what stands by itself is not listed.

    Args:
        slots: the slots before it; None where they were the tokens themselves.
        keep: which of the tokens of the call were stored; None for all.
        bias: `[B, M]` fp32 of the stored tokens, or None.
        past: tokens of the unpruned sequence before the call.
        rows: `[B, length]` int64, positions of all tokens of the call within it.
    """
    if keep is None and bias is None:
        return Slots(rows[:, :0], 0) if slots is None else slots
    new = (rows if keep is None else keep.index) + past
    if keep is not None and keep.valid is not None:
        new = new.masked_fill(~keep.valid, -1)
    before = past if slots is None else past - slots.dropped
    if slots is None:
        earlier = torch.arange(before, dtype=torch.int64, device=new.device).expand(len(new), -1)
    else:
        earlier = slots.columns(torch.arange(past, dtype=torch.int64, device=new.device)).to(new.device)
    old_bias = None if slots is None else slots.biases(n_slots=before)
    if bias is not None or old_bias is not None:
        none = [torch.zeros_like(some, dtype=torch.float32) for some in (earlier, new)]
        old_bias = none[0] if old_bias is None else old_bias.to(new.device)
        bias = none[1] if bias is None else bias
        bias = torch.cat([old_bias, bias], dim=1)
    dropped = past + rows.shape[1] - before - new.shape[1]
    has_padding_slots = (keep is not None and keep.valid is not None) or (slots is not None and slots.has_padding_slots)
    return Slots(torch.cat([earlier, new], dim=1), dropped, has_padding_slots, bias)
