"""A KV cache that is shorter than the sequence it stands for.

After pruning, a cache holds fewer slots than the sequence has tokens. Everything outside the decoder (``generate``, a
manual loop, the model's own position and mask code) goes on counting in tokens of the unpruned sequence; everything
inside the decoder counts slots. The cache object bridges the two: its class becomes a subclass of its own class whose
answers are *logical* outside the decoder's forward and *physical* within it, and the map between the two
(:class:`Slots`) sits on the object. So a second turn, chunked prefill, assisted decoding and manual loops need no code
of their own.

Mask sizes are logical outside the decoder too, although physical ones would spare the decoder's masks a gather: so
every mask that is built above the decoder comes out as for the unpruned sequence, and one rule serves all families
(:mod:`masks`).
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.reduction import Keep

_STATE = "_tokenprune_slots"


@dataclass
class Slots:
    """Where the slots of a pruned cache stand in the unpruned sequence.

    Attributes:
        index: `[B, M]` int64, position in the unpruned sequence of each of the first M slots, -1 for a slot that only
            fills a row up. Slots after the M-th stand at `slot + dropped`.
        dropped: how many more tokens than slots there are.
        shift: `[B]` int64, by how much positions that go on are lowered (`positions="packed"`), or None.
        has_fillers: whether some slot only fills a row up.
        inside: whether the decoder's forward is running, so that lengths are asked for in slots.
    """

    index: Tensor
    dropped: int
    shift: Tensor | None = None
    has_fillers: bool = False
    inside: bool = False

    def columns(self, *, n_slots: int) -> Tensor:
        """Position in the unpruned sequence of each of `n_slots` slots, `[B, n_slots]` int64, -1 where a slot only
        fills up."""
        start = self.index.shape[1]
        tail = torch.arange(start, n_slots, device=self.index.device) + self.dropped
        return torch.cat([self.index[:, :n_slots], tail.expand(self.index.shape[0], -1)], dim=1)

    def crop(self, *, n_slots: int) -> None:
        """Forget the slots from the `n_slots`-th on.

        Raises:
            InputError: a removed slot stands before a token that was pruned, so that removing slots would not remove
                tokens.
        """
        surplus = self.index.shape[1] - n_slots
        if surplus <= 0:
            return
        end = self.index.shape[1] + self.dropped
        tail = torch.arange(end - surplus, end, device=self.index.device)
        if not bool((self.index[:, n_slots:] == tail).all()):
            raise InputError(
                f"cropping the cache to {n_slots} slots would cut into pruned visual tokens; only the text after "
                "them can be cropped"
            )
        self.index = self.index[:, :n_slots]


class _PrunedCache:
    """What a pruned cache does differently; mixed into the class of the cache it came from."""

    layers: list[Any]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Length of the sequence: in tokens outside the decoder, in slots within it."""
        slots: Slots = getattr(self, _STATE)
        physical = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return physical if slots.inside else physical + slots.dropped

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[Any, int]:
        """Length and offset of the keys that a mask has to cover, counted as in :meth:`get_seq_length`."""
        slots: Slots = getattr(self, _STATE)
        if slots.inside:
            sizes: tuple[Any, int] = super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
            return sizes
        past = int(self.get_seq_length(layer_idx))
        layer = self.layers[layer_idx]
        window = window_of(layer)
        if window is None or past < window:
            return past + query_length, 0
        return window - 1 + query_length, past - window + 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the name of the class that the cache came from."""
        return _rebuild, (type(self).__mro__[2],), self.__dict__

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as on an unpruned cache."""
        slots: Slots = getattr(self, _STATE)
        physical = int(super().get_seq_length())  # type: ignore[misc]
        slots.crop(n_slots=physical - abs(tokens_to_remove))
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        """Empty the cache; it is an ordinary one again."""
        super().reset()  # type: ignore[misc]
        delattr(self, _STATE)
        self.__class__ = type(self).__mro__[2]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows as beam search does."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        n_rows = getattr(self, _STATE).index.shape[0]
        self._take_rows(torch.arange(n_rows).repeat_interleave(repeats))

    def _take_rows(self, rows: Tensor) -> None:
        slots: Slots = getattr(self, _STATE)
        rows = rows.to(slots.index.device)
        slots.index = slots.index[rows]
        slots.shift = None if slots.shift is None else slots.shift[rows]


@functools.cache
def _pruned_class(cls: type) -> type:
    return type(f"Pruned{cls.__name__}", (_PrunedCache, cls), {"__module__": __name__})


def _rebuild(cls: Any) -> Any:
    return object.__new__(_pruned_class(cls))


def window_of(layer: Any) -> int | None:
    """Sliding window of a cache layer in slots, or None for a layer that keeps everything."""
    if not getattr(layer, "is_sliding", False):
        return None
    window = getattr(layer, "sliding_window", None)
    return int(layer.max_cache_len if window is None else window)


def slots_of(cache: Any) -> Slots | None:
    """The slots of a pruned cache, None for any other cache or for no cache."""
    slots = getattr(cache, _STATE, None)
    return slots if isinstance(slots, Slots) else None


def past_length(cache: Any) -> int:
    """Tokens of the unpruned sequence that `cache` stands for; 0 without a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_cache(cache: Any) -> None:
    """Check that a cache can go on after pruning.

    Raises:
        UnsupportedModelError: it cannot.
    """
    if cache is not None and not hasattr(cache, "layers"):
        raise UnsupportedModelError(
            f"cannot prune with a cache of type {type(cache).__name__}; a transformers Cache made of layers works "
            "(DynamicCache, StaticCache, QuantizedCache), and so does use_cache=False"
        )


def record(cache: Any, keep: Keep, *, past: int, length: int, shift: Tensor | None) -> None:
    """Write down on `cache` that its last forward stored `keep` of `length` tokens after `past` tokens.

    Args:
        cache: the cache that the forward filled.
        keep: which of the `length` tokens were stored, `index` `[B, M]`.
        past: tokens of the unpruned sequence before this forward.
        length: tokens of the unpruned sequence in this forward.
        shift: `[B]` how many positions the packed policy has taken out so far, or None.
    """
    slots = slots_of(cache)
    index = keep.index + past
    if keep.valid is not None:
        index = index.masked_fill(~keep.valid, -1)
    before = past if slots is None else past - slots.dropped
    if slots is None:
        earlier = torch.arange(before, device=index.device).expand(index.shape[0], -1)
    else:
        earlier = slots.columns(n_slots=before).to(index.device)
    dropped = past + length - before - keep.index.shape[1]
    has_fillers = keep.valid is not None or (slots is not None and slots.has_fillers)
    setattr(cache, _STATE, Slots(torch.cat([earlier, index], dim=1), dropped, shift, has_fillers))
    if slots is None:
        cls: Any = type(cache)
        cache.__class__ = _pruned_class(cls)
