"""Attention masks of a pruned sequence: the masks of the unpruned one with rows and columns taken out.

That is the whole rule, and it holds for padding, causality, sliding windows (which count tokens of the
unpruned sequence) and the bidirectional image blocks of some families. Where the decoder would build the same mask by
itself from a 2-D padding mask, it is given just that, so that fused attention keeps its fast paths.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.decoder.call import Call
from tokenprune.errors import InputError
from tokenprune.reduction import gather
from tokenprune.upstream.caches import layer_mask_sizes


@dataclass(frozen=True)
class Layout:
    """Rows and columns of a pruned forward in terms of the unpruned sequence.

    Attributes:
        rows: `[B, M]` int64, which of the tokens of this call are kept.
        columns: `[B, P + M]` int64, position in the unpruned sequence of every slot, the P earlier ones first; -1 for a
            padding slot.
        has_padding_slots: whether there are some.
        bias: `[B, P + M]` fp32, what is added to the logits of every slot, or None.
    """

    rows: Tensor
    columns: Tensor
    has_padding_slots: bool = False
    bias: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether None, "plain causality" to fused attention, says the same of the pruned rows: there is no padding
        slot, and the keys are the same tokens as the queries or there is one query."""
        same = self.rows.shape[1] == 1 or self.columns.shape[1] == self.rows.shape[1]
        return same and not self.has_padding_slots and self.bias is None


def valid_slots(call: Call, layout: Layout, mask: Tensor | None) -> Tensor:
    """Which slots are neither padding slots nor padding by the 2-D `mask` of the unpruned sequence (None: there is
    none), `[B, P + M]` bool.

    Raises:
        InputError: the mask is too short.
    """
    valid = layout.columns >= 0
    if mask is None:
        return valid
    if mask.shape[1] < call.past + call.length:
        raise InputError(
            f"attention_mask has {mask.shape[1]} columns, but {call.past} cached and {call.length} new tokens of the "
            "unpruned sequence need one each"
        )
    return valid & gather(mask.to(valid.device, torch.bool), layout.columns.clamp(min=0))


def decoder_mask(call: Call, layout: Layout, *, like: Tensor) -> Any:
    """What the decoder is to get as `attention_mask`: a 2-D mask where it was to get one, or none.

    Args:
        call: how it was called.
        layout: rows and columns of its first layers.
        like: embeddings; an additive mask has their dtype.
    """
    if isinstance(call.mask, dict):
        return {kind: layer_mask(call, layout, layer=call.facts.layer_of(kind), like=like) for kind in call.mask}
    if layout.bias is not None:
        by_kind = call.facts.first_layers()
        masks = {kind: layer_mask(call, layout, layer=layer, like=like) for kind, layer in by_kind.items()}
        return masks or layer_mask(call, layout, layer=0, like=like)
    if call.mask is not None and call.mask.ndim == 4:
        return layer_mask(call, layout, layer=0, like=like)
    if call.mask is None and call.cache is not None and not layout.has_padding_slots:
        return None
    return valid_slots(call, layout, call.mask)


def layer_mask(call: Call, layout: Layout, *, layer: int, like: Tensor) -> Any:
    """What one decoder layer is to get as `attention_mask`, in the form that its attention takes.

    Args:
        call: how the decoder was called.
        layout: rows and columns of the layer.
        layer: index of the layer.
        like: hidden states; an additive mask has their dtype.
    """
    facts, mask, kind = call.facts, call.effective_mask, None
    if isinstance(mask, dict):
        kind = facts.kind_of(layer)
        kind = kind if kind in mask else next(iter(mask))
        mask = mask[kind]
    if facts.is_recurrent(facts.kind_of(layer)):
        return _own_tokens(call, layout, mask)
    sizes = layer_mask_sizes(call.cache, layout.rows.shape[1], layer)
    if mask is not None and mask.ndim == 4:
        block = _block(call, layout, mask, sizes=sizes, offset=call.offsets[kind])
    else:
        some_hidden = mask is not None or layout.has_padding_slots
        valid = valid_slots(call, layout, mask) if some_hidden else None
        full = valid is None or bool(valid.all())
        if call.flash:
            return None if full else valid
        longer = sum(sizes) != layout.columns.shape[1]  # a static cache has room for more
        if full and layout.plain and not longer and not facts.eager:
            return None
        shown = layout if valid is None else replace(layout, columns=layout.columns.masked_fill(~valid, -1))
        block = _block(call, shown, None, sizes=sizes, offset=0)
    if block.dtype == torch.bool and (facts.eager or layout.bias is not None):
        block = torch.zeros_like(block, dtype=like.dtype).masked_fill_(~block, torch.finfo(like.dtype).min)
    return block if layout.bias is None else _biased(block, layout.bias, sizes[1] if call.cache is not None else 0)


def _block(call: Call, layout: Layout, mask: Tensor | None, *, sizes: tuple[int, int], offset: int) -> Tensor:
    """4-D mask for layers of one kind.

    Args:
        call: how the decoder was called.
        layout: rows and columns.
        mask: unpruned mask `[B, 1, length, keys]`, bool (True = seen) or additive float; None for plain causality.
        sizes: number and first slot of the keys that the layers look at.
        offset: position in the unpruned sequence of the first column of `mask`.

    Raises:
        InputError: the mask is too short.
    """
    n_keys, first = sizes
    columns = layout.columns[:, first : first + n_keys]
    columns = pad(columns, (0, n_keys - columns.shape[1]), value=-1)  # a static cache is longer than what it holds
    if mask is None:
        seen = (columns[:, None, :] <= layout.rows[:, :, None] + call.past) & (columns >= 0)[:, None, :]
        return seen[:, None]
    if (end := call.past + call.length) > offset + mask.shape[-1]:
        raise InputError(
            f"the attention mask ends at token {offset + mask.shape[-1]} of {end}; a StaticCache must have room for "
            f"the unpruned prompt (max_cache_len of at least {end})"
        )
    inside = (columns >= offset) & (columns < offset + mask.shape[-1])
    columns = (columns - offset).clamp(0, mask.shape[-1] - 1)
    mask = gather(mask.transpose(0, 1), layout.rows, dim=2).transpose(0, 1)
    columns, inside = columns.to(mask.device), inside.to(mask.device)
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~inside[:, None, None, :], hidden)


def _biased(block: Tensor, bias: Tensor, first: int) -> Tensor:
    """An additive mask with the bias `[B, P + M]` of the slots from `first` on, but where it hides them."""
    bias = bias[:, first : first + block.shape[-1]]
    bias = pad(bias, (0, block.shape[-1] - bias.shape[1]))[:, None, None, :].to(block)
    return torch.where(block == torch.finfo(block.dtype).min, block, block + bias)


def _own_tokens(call: Call, layout: Layout, mask: Any) -> Tensor | None:
    """Which of the kept tokens of a call are neither padding nor padding slots, `[B, M]` bool, as recurrent layers want
    it; None where all are, or where there is one only."""
    if layout.rows.shape[1] == 1:
        return None
    valid = layout.columns[:, -layout.rows.shape[1] :] >= 0
    if mask is not None and mask.ndim == 2:
        valid &= gather(mask[:, -call.length :].to(valid.device, torch.bool), layout.rows)
    return None if bool(valid.all()) else valid
