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
from tokenprune.models.cache import window_of
from tokenprune.reduction import gather

RECURRENT = frozenset(("conv", "linear_attention"))
"""Kinds of layers that go through the tokens one by one; their masks say which of the call's tokens are padding."""


@dataclass(frozen=True)
class Layout:
    """Rows and columns of a pruned forward in terms of the unpruned sequence.

    Attributes:
        rows: `[B, M]` int64, which of the tokens of this call go on.
        columns: `[B, P + M]` int64, position in the unpruned sequence of every slot, the P earlier ones first; -1 for a
            slot that only fills a row up.
        past: tokens of the unpruned sequence before this call.
        length: tokens of the unpruned sequence in this call.
        has_fillers: whether some slot only fills a row up.
        bias: `[B, P + M]` fp32, what is added to the logits of every slot, or None.
    """

    rows: Tensor
    columns: Tensor
    past: int
    length: int
    has_fillers: bool = False
    bias: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether None, "plain causality" to fused attention, stands for the pruned rows too: no row is filled up, and
        the keys are the same tokens as the queries or there is one query."""
        same = self.rows.shape[1] == 1 or self.columns.shape[1] == self.rows.shape[1]
        return same and not self.has_fillers and self.bias is None


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


def _entry(mask: Any, layout: Layout, cache: Any, layer: int, offset: int, *, kind: str | None = None) -> Any:
    """Prune the mask of the layers of one kind, of which `layer` is one."""
    if kind in RECURRENT:
        return _own(mask, layout)
    if mask is not None and mask.ndim == 2:
        return _padding(mask, layout)
    if mask is None and layout.plain:
        return None
    n_rows = layout.rows.shape[1]
    sizes = (n_rows, 0) if cache is None else cache_sizes(cache, n_rows, layer)
    return _block(mask, layout, sizes=sizes, offset=offset)


def cache_sizes(cache: Any, length: int, layer: int) -> tuple[int, int]:
    """Number and first slot of the keys that `layer` looks at when `length` more slots come, straight from the
    cache's layer."""
    if layer >= len(cache.layers):
        return length, 0
    n_keys, first = cache.layers[layer].get_mask_sizes(length)
    return int(n_keys), int(first)


def layer_of_kind(config: Any, kind: str | None) -> int:
    """First decoder layer of the kind of a mask's key (`full_attention`, ...); 0 where there is one mask for all
    layers."""
    kinds = getattr(config, "layer_types", None)
    if kind is None or not kinds or kind not in kinds:
        return 0
    return int(list(kinds).index(kind))


def offset_of(mask: Any, cache: Any, config: Any, length: int) -> int:
    """Position in the unpruned sequence of the first key that a 4-D mask (or the first entry of a dict of them)
    covers."""
    if cache is None or not cache.layers:
        return 0
    kinds = [kind for kind in sorted(mask) if isinstance(mask[kind], Tensor)] if isinstance(mask, dict) else []
    kinds = [kind for kind in kinds if kind not in RECURRENT]
    layer = layer_of_kind(config, kinds[0] if kinds else None)
    return int(cache.get_mask_sizes(length, layer)[1])


def slides(config: Any, cache: Any, *, total: int) -> bool:
    """Whether some layer has a sliding window shorter than the `total` tokens of the unpruned sequence."""
    windows = [] if cache is None else [window_of(layer) for layer in cache.layers]
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and (kinds is None or any("sliding" in kind for kind in kinds)):
        windows.append(int(window))
    return any(window is not None and window < total for window in windows)


def dense_mask(config: Any, mask: Tensor | None, cache: Any, *, embeds: Tensor, positions: Tensor) -> Any:
    """The masks that the decoder would build for the unpruned sequence, by the public function that ``generate`` uses
    for it."""
    from transformers.masking_utils import create_masks_for_generate

    empty = embeds.new_empty(embeds.shape[0], embeds.shape[1], 0)
    if mask is None:  # without a mask and a cache, gaps in the positions would be taken for packed sequences
        mask = torch.ones(
            embeds.shape[0],
            embeds.shape[1] + (0 if cache is None else int(cache.get_seq_length())),
            device=embeds.device,
        )
    return create_masks_for_generate(
        config=config, inputs_embeds=empty, attention_mask=mask, past_key_values=cache, position_ids=positions
    )


def offsets_of(mask: Any, cache: Any, config: Any, length: int) -> dict[str | None, int]:
    """For each kind of layers that `mask` tells apart, the position in the unpruned sequence of its first column.

    To be asked before the decoder runs, while the cache answers in tokens.
    """
    kinds: list[str | None] = sorted(mask) if isinstance(mask, dict) else [None]
    layers = {kind: layer_of_kind(config, kind) for kind in kinds}
    return {
        kind: int(cache.get_mask_sizes(length, layer)[1])
        if cache is not None and layer < len(cache.layers) and kind not in RECURRENT
        else 0
        for kind, layer in layers.items()
    }


def prune_mask(mask: Any, layout: Layout, cache: Any, config: Any, offsets: dict[str | None, int]) -> Any:
    """Prune whatever the decoder was to get as `attention_mask`.

    Args:
        mask: None, 2-D padding mask `[B, past + length]`, 4-D mask `[B, 1, length, keys]`, or a dict of these by kind
            of layer.
        layout: rows and columns of the pruned forward.
        cache: the cache that the forward will use, or None.
        config: configuration of the decoder.
        offsets: see :func:`offsets_of`.

    Returns:
        The same kind of thing for M rows. A 2-D mask stays one.
    """
    if isinstance(mask, dict):
        return {
            kind: _entry(entry, layout, cache, layer_of_kind(config, kind), offsets[kind], kind=kind)
            for kind, entry in mask.items()
        }
    if mask is None or mask.ndim == 2:
        return _padding(mask, layout)
    return _entry(mask, layout, cache, layer_of_kind(config, None), offsets[None])


def layer_mask(
    mask: Any, layout: Layout, cache: Any, config: Any, offsets: dict[str | None, int], *, layer: int, like: Tensor
) -> Any:
    """What one decoder layer is to get as `attention_mask`, in the form that its attention takes.

    Args:
        mask: what the decoder was to get for the unpruned sequence, see :func:`prune_mask`.
        layout: rows and columns of the layer's forward.
        cache: the cache, or None.
        config: configuration of the decoder.
        offsets: see :func:`offsets_of`.
        layer: index of the layer.
        like: hidden states; an additive mask has their dtype.
    """
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds and isinstance(mask, dict) else None
    if isinstance(mask, dict):
        kind = kind if kind in mask else next(iter(mask))
        mask = mask[kind]
    if kinds and kinds[layer] in RECURRENT:
        return _own(mask, layout)
    implementation = str(config._attn_implementation)
    if "flash" in implementation:
        if mask is not None and mask.ndim == 4:
            return _entry(mask, layout, cache, layer, offsets[kind])
        padding = _padding(mask, layout)
        return None if bool(padding.all()) else padding
    block = None
    if mask is not None and mask.ndim == 4:
        block = _entry(mask, layout, cache, layer, offsets[kind])
    else:
        real = None if mask is None and not layout.has_fillers else _padding(mask, layout)
        full = real is None or bool(real.all())
        sizes = (layout.rows.shape[1], 0) if cache is None else cache_sizes(cache, layout.rows.shape[1], layer)
        longer = sum(sizes) != layout.columns.shape[1]  # a static cache has room for more
        if longer or not layout.plain or implementation == "eager" or not full:
            columns = layout.columns if real is None else layout.columns.masked_fill(~real, -1)
            seen = replace(layout, columns=columns)
            block = _block(None, seen, sizes=sizes, offset=0)
    if block is None or (block.dtype == torch.bool and implementation != "eager" and layout.bias is None):
        return block
    if block.dtype == torch.bool:
        block = torch.zeros_like(block, dtype=like.dtype).masked_fill_(~block, torch.finfo(like.dtype).min)
    if layout.bias is not None:
        n_keys, first = (block.shape[-1], 0) if cache is None else cache_sizes(cache, layout.rows.shape[1], layer)
        bias = layout.bias[:, first : first + n_keys]
        bias = torch.nn.functional.pad(bias, (0, n_keys - bias.shape[1]))[:, None, None, :].to(block)
        block = torch.where(block == torch.finfo(block.dtype).min, block, block + bias)
    return block
