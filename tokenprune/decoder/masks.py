"""Attention masks of a pruned sequence: the masks of the unpruned one with rows and columns taken out.

That is the whole rule, and it holds for padding, causality, sliding windows (which go on counting tokens of the
unpruned sequence) and the bidirectional image blocks of some families. Where the decoder would build the same mask by
itself from a 2-D padding mask, it is given just that, so that fused attention keeps its fast paths.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import InputError
from tokenprune.reduction import gather
from tokenprune.upstream.caches import first_key, layer_mask_sizes, layers_of, window_of
from tokenprune.upstream.facts import DecoderFacts


@dataclass(frozen=True)
class Layout:
    """Rows and columns of a pruned forward in terms of the unpruned sequence.

    Attributes:
        rows: `[B, M]` int64, which of the tokens of this call go on.
        columns: `[B, P + M]` int64, position in the unpruned sequence of every slot, the P earlier ones first; -1 for a
            slot that only fills a row up.
        past: tokens of the unpruned sequence before this call.
        length: tokens of the unpruned sequence in this call.
        has_padding_slots: whether some slot only fills a row up.
        bias: `[B, P + M]` fp32, what is added to the logits of every slot, or None.
    """

    rows: Tensor
    columns: Tensor
    past: int
    length: int
    has_padding_slots: bool = False
    bias: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether None, "plain causality" to fused attention, stands for the pruned rows too: no row is filled up, and
        the keys are the same tokens as the queries or there is one query."""
        same = self.rows.shape[1] == 1 or self.columns.shape[1] == self.rows.shape[1]
        return same and not self.has_padding_slots and self.bias is None


def _padding(mask: Tensor | None, layout: Layout) -> Tensor:
    """2-D mask `[B, P + M]` bool out of the unpruned `[B, past + length]` one (or none)."""
    valid = layout.columns >= 0
    if mask is None:
        return valid
    if mask.shape[1] < layout.past + layout.length:
        raise InputError(
            f"attention_mask has {mask.shape[1]} columns, but {layout.past} cached and {layout.length} new tokens of "
            "the unpruned sequence need one each"
        )
    return valid & gather(mask.to(valid.device, torch.bool), layout.columns.clamp(min=0))


def _block(mask: Tensor | None, layout: Layout, *, sizes: tuple[int, int], offset: int) -> Tensor:
    """4-D mask for one kind of layers.

    Args:
        mask: unpruned mask `[B, 1, length, keys]`, bool (True = seen) or additive float; None stands for plain
            causality.
        layout: rows and columns.
        sizes: number and first slot of the keys that the layers look at.
        offset: position in the unpruned sequence of the first column of `mask`.
    """
    n_keys, first = sizes
    columns = layout.columns[:, first : first + n_keys]
    if (missing := n_keys - columns.shape[1]) > 0:  # a static cache is longer than what it holds
        columns = torch.nn.functional.pad(columns, (0, missing), value=-1)
    if mask is None:
        seen = (columns[:, None, :] <= layout.rows[:, :, None] + layout.past) & (columns >= 0)[:, None, :]
        return seen[:, None]
    if (end := layout.past + layout.length) > offset + mask.shape[-1]:
        raise InputError(
            f"the attention mask ends at token {offset + mask.shape[-1]} of {end}; a StaticCache must have room for "
            f"the unpruned prompt (max_cache_len of at least {end})"
        )
    inside = (columns >= offset) & (columns < offset + mask.shape[-1])
    columns = (columns - offset).clamp(0, mask.shape[-1] - 1)
    mask = gather(mask.transpose(0, 1), layout.rows, dim=2).transpose(0, 1)
    columns, inside = columns.to(mask.device), inside.to(mask.device)
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
    return mask.masked_fill(
        ~inside[:, None, None, :], False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    )


def _own(mask: Any, layout: Layout) -> Tensor | None:
    """Which of the call's tokens that go on are neither padding nor fill a row up, `[B, M]` bool; None where all are,
    or where there is one only."""
    if layout.rows.shape[1] == 1:
        return None
    valid = layout.columns[:, -layout.rows.shape[1] :] >= 0
    if mask is not None and mask.ndim == 2:
        valid &= gather(mask[:, -layout.length :].to(valid.device, torch.bool), layout.rows)
    return None if bool(valid.all()) else valid


def _entry(mask: Any, layout: Layout, cache: Any, layer: int, offset: int) -> Any:
    """Prune the mask of the layers of one kind, of which `layer` is one."""
    if mask is not None and mask.ndim == 2:
        return _padding(mask, layout)
    if mask is None and layout.plain:
        return None
    n_rows = layout.rows.shape[1]
    sizes = layer_mask_sizes(cache, n_rows, layer)
    return _block(mask, layout, sizes=sizes, offset=offset)


def offset_of(mask: Any, cache: Any, facts: DecoderFacts, length: int) -> int:
    """Position in the unpruned sequence of the first key that a 4-D mask (or the first entry of a dict of them)
    covers."""
    kinds = [kind for kind in sorted(mask) if isinstance(mask[kind], Tensor)] if isinstance(mask, dict) else []
    kinds = [kind for kind in kinds if not facts.is_recurrent(kind)]
    return first_key(cache, length, facts.layer_of(kinds[0] if kinds else None))


def slides(facts: DecoderFacts, cache: Any, *, total: int) -> bool:
    """Whether some layer has a sliding window shorter than the `total` tokens of the unpruned sequence."""
    windows = [window_of(layer) for layer in layers_of(cache)]
    return any(window is not None and window < total for window in (*windows, facts.window))


def offsets_of(mask: Any, cache: Any, facts: DecoderFacts, length: int) -> dict[str | None, int]:
    """For each kind of layers that `mask` tells apart, the position in the unpruned sequence of its first column.

    To be asked before the decoder runs, while the cache answers in tokens.
    """
    kinds: list[str | None] = sorted(mask) if isinstance(mask, dict) else [None]
    return {kind: 0 if facts.is_recurrent(kind) else first_key(cache, length, facts.layer_of(kind)) for kind in kinds}


def prune_mask(mask: Any, layout: Layout, cache: Any, facts: DecoderFacts, offsets: dict[str | None, int]) -> Any:
    """Prune whatever the decoder was to get as `attention_mask`.

    Args:
        mask: None, 2-D padding mask `[B, past + length]`, 4-D mask `[B, 1, length, keys]`, or a dict of these by kind
            of layer.
        layout: rows and columns of the pruned forward.
        cache: the cache that the forward will use, or None.
        facts: the decoder's.
        offsets: see :func:`offsets_of`.

    Returns:
        The same kind of thing for M rows. A 2-D mask stays one.
    """
    if isinstance(mask, dict):
        return {
            kind: _own(entry, layout)
            if facts.is_recurrent(kind)
            else _entry(entry, layout, cache, facts.layer_of(kind), offsets[kind])
            for kind, entry in mask.items()
        }
    if mask is None or mask.ndim == 2:
        return _padding(mask, layout)
    return _entry(mask, layout, cache, 0, offsets[None])


def layer_mask(
    mask: Any,
    layout: Layout,
    cache: Any,
    facts: DecoderFacts,
    offsets: dict[str | None, int],
    *,
    layer: int,
    like: Tensor,
) -> Any:
    """What one decoder layer is to get as `attention_mask`, in the form that its attention takes.

    Args:
        mask: what the decoder was to get for the unpruned sequence, see :func:`prune_mask`.
        layout: rows and columns of the layer's forward.
        cache: the cache, or None.
        facts: the decoder's.
        offsets: see :func:`offsets_of`.
        layer: index of the layer.
        like: hidden states; an additive mask has their dtype.
    """
    kind = facts.kind_of(layer) if isinstance(mask, dict) else None
    if isinstance(mask, dict):
        kind = kind if kind in mask else next(iter(mask))
        mask = mask[kind]
    if facts.is_recurrent(facts.kind_of(layer)):
        return _own(mask, layout)
    if facts.flash:
        if mask is not None and mask.ndim == 4:
            return _entry(mask, layout, cache, layer, offsets[kind])
        padding = _padding(mask, layout)
        return None if bool(padding.all()) else padding
    block = None
    if mask is not None and mask.ndim == 4:
        block = _entry(mask, layout, cache, layer, offsets[kind])
    else:
        real = None if mask is None and not layout.has_padding_slots else _padding(mask, layout)
        full = real is None or bool(real.all())
        sizes = layer_mask_sizes(cache, layout.rows.shape[1], layer)
        longer = sum(sizes) != layout.columns.shape[1]  # a static cache has room for more
        if longer or not layout.plain or facts.eager or not full:
            columns = layout.columns if real is None else layout.columns.masked_fill(~real, -1)
            seen = replace(layout, columns=columns)
            block = _block(None, seen, sizes=sizes, offset=0)
    if block is None or (block.dtype == torch.bool and not facts.eager and layout.bias is None):
        return block
    if block.dtype == torch.bool:
        block = torch.zeros_like(block, dtype=like.dtype).masked_fill_(~block, torch.finfo(like.dtype).min)
    if layout.bias is not None:
        sizes = layer_mask_sizes(cache, layout.rows.shape[1], layer)
        n_keys, first = (block.shape[-1], 0) if cache is None else sizes
        bias = layout.bias[:, first : first + n_keys]
        bias = torch.nn.functional.pad(bias, (0, n_keys - bias.shape[1]))[:, None, None, :].to(block)
        block = torch.where(block == torch.finfo(block.dtype).min, block, block + bias)
    return block
