"""Segments: stretches of decoder layers that see the same tokens. Without pruning inside the decoder there is one."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenprune.decoder.call import Call
from tokenprune.decoder.masks import Layout, layer_mask
from tokenprune.decoder.pruned_cache import Slots, grown, ledger_of
from tokenprune.reduction import Keep, gather
from tokenprune.upstream.caches import layer_mask_sizes


@dataclass
class Segment:
    """Decoder layers that see the same tokens.

    Attributes:
        first: index of the first of them.
        keep: the tokens of the call that they see, None for all.
        slots: what their caches held before the call, None where that is the unpruned sequence.
        bias: `[B, M]` fp32, what attention adds to the logits of these tokens, or None.
        local: `[B, M]` int64, these tokens among those of the first segment; None where they are the same.
    """

    first: int
    keep: Keep | None
    slots: Slots | None
    bias: Tensor | None = None
    local: Tensor | None = None
    _masks: dict[Any, Any] = field(default_factory=dict, repr=False)
    _layout: Layout | None = field(default=None, repr=False)

    def n_keys(self, call: Call) -> int:
        """Slots of its layers after a call whose tokens they all see."""
        return call.past + call.length - (0 if self.slots is None else self.slots.dropped)

    def is_whole(self, call: Call) -> bool:
        """Whether its layers see all tokens of a call and all their slots, none of which is padding."""
        slots = self.slots
        whole = self.keep is None and self.bias is None and call.flat and call.effective_mask is None
        return whole and (slots is None or not (slots.has_padding_slots or slots.bias is not None))

    def is_plain_step(self, call: Call, layer: int) -> bool:
        """Whether `layer` sees all its slots in a call of one token, and its attention knows so without a mask."""
        if call.length > 1 or call.cache is None or not call.fused or not self.is_whole(call):
            return False
        if call.facts.recurrent and call.facts.is_recurrent(call.facts.kind_of(layer)):
            return False
        return call.grows or sum(layer_mask_sizes(call.cache, 1, layer)) == self.n_keys(call)

    def layout(self, call: Call) -> Layout:
        """Rows and columns of the segment's masks."""
        if self._layout is None:
            rows = call.all_rows if self.keep is None else self.keep.index
            after = grown(self.slots, self.keep, self.bias, past=call.past, rows=call.all_rows)
            columns = after.columns(call.sequence).to(rows.device)
            self._layout = Layout(rows, columns, after.has_padding_slots, after.biases(n_slots=columns.shape[1]))
        return self._layout

    def mask(self, call: Call, *, layer: int, like: Tensor) -> Any:
        """What `layer` is to get as `attention_mask`; `like` are its hidden states."""
        if self.is_plain_step(call, layer):
            return None
        key = (call.facts.kind_of(layer), like.device)
        if key not in self._masks:
            self._masks[key] = layer_mask(call, self.layout(call), layer=layer, like=like)
        return self._masks[key]

    def then(self, local: Keep, call: Call) -> None:
        """Have its layers see what `local` keeps of the tokens that they saw so far."""
        whole = Keep(call.all_rows) if self.keep is None else self.keep
        self.keep = whole.then(local)
        self.local = local.index if self.local is None else gather(self.local, local.index)
        self.bias = None if self.bias is None else gather(self.bias, local.index)
        self._masks, self._layout = {}, None


def first_segments(cache: Any) -> list[Segment]:
    """One segment for each part of a cache."""
    ledger = ledger_of(cache)
    if ledger is None:
        return [Segment(0, None, None)]
    return [
        Segment(start, None, slots if slots.differ else None)
        for start, slots in zip(ledger.starts, ledger.parts, strict=True)
    ]
