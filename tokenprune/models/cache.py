"""A KV cache that is shorter than the sequence it stands for.

After pruning, a cache holds fewer slots than the sequence has tokens. Everything outside the decoder (``generate``, a
manual loop, the model's own position and mask code) goes on counting in tokens of the unpruned sequence; everything
inside the decoder counts slots. The cache object bridges the two: its class becomes a subclass of its own class whose
answers are *logical* outside the decoder's forward and *physical* within it, and the map between the two
(:class:`Ledger`) sits on the object. So a second turn, chunked prefill, assisted decoding and manual loops need no code
of their own.

Mask sizes are logical outside the decoder too, although physical ones would spare the decoder's masks a gather: so
every mask that is built above the decoder comes out as for the unpruned sequence, and one rule serves all families
(:mod:`masks`).
"""

import bisect
import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.reduction import Keep
from tokenprune.signals import Probe, Traffic

LAYERED = (
    "this cache was pruned layer by layer, and the model is not patched with a method that does so; patch it as it was "
    "when the cache was made"
)
_STATE = "_tokenprune_slots"


@dataclass
class Slots:
    """Where the slots of some layers of a pruned cache stand in the unpruned sequence.

    Attributes:
        index: `[B, M]` int64, position in the unpruned sequence of each of the first M slots, -1 for a slot that only
            fills a row up. Slots after the M-th stand at `slot + dropped`.
        dropped: how many more tokens than slots there are.
        has_fillers: whether some slot only fills a row up.
        bias: `[B, M]` fp32, what attention adds to the logits of each of the first M slots (0 for later ones), or None.
    """

    index: Tensor
    dropped: int
    has_fillers: bool = False
    bias: Tensor | None = None

    @property
    def differ(self) -> bool:
        """Whether the slots are not simply the tokens."""
        return self.dropped > 0 or self.has_fillers or self.bias is not None

    def columns(self, *, n_slots: int) -> Tensor:
        """Position in the unpruned sequence of each of `n_slots` slots, `[B, n_slots]` int64, -1 where a slot only
        fills up."""
        start = self.index.shape[1]
        tail = torch.arange(start, n_slots, device=self.index.device) + self.dropped
        return torch.cat([self.index[:, :n_slots], tail.expand(self.index.shape[0], -1)], dim=1)

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
        tail = torch.arange(end - surplus, end, device=self.index.device)
        if not bool((self.index[:, n_slots:] == tail).all()):
            raise InputError(
                f"cropping the cache to {n_slots} slots would cut into pruned tokens; only what follows them can be "
                "cropped: the text after images or, where text is pruned too, the last keep_recent tokens, more than "
                "which no call may have drafted"
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
        shift: `[B]` int64, by how much positions that go on are lowered (`positions="packed"`), or None.
        inside: whether the decoder's forward is running, so that lengths are asked for in slots.
        scores: `[B, n]` fp32, importance that the first n tokens of the unpruned sequence have gathered, by what asked
            for it.
        padding: `[B, n]` bool on the CPU, which of the first n tokens are no padding, where somebody wants to know.
        head_scores: `[B, H]` fp32, magnitudes that the outputs of the heads have gathered, likewise.
        traffic: bytes of keys and values read so far, likewise.
        patterns: for each layer the heads that it kept in the last call, where they were the same in all rows.
    """

    starts: tuple[int, ...]
    parts: tuple[Slots, ...]
    shift: Tensor | None = None
    inside: bool = False
    scores: dict[Probe, Tensor] = field(default_factory=dict)
    padding: Tensor | None = None
    head_scores: Tensor | None = None
    traffic: Traffic = field(default_factory=Traffic)
    patterns: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def at(self, layer: int) -> Slots:
        """The slots of a layer."""
        return self.parts[bisect.bisect_right(self.starts, layer) - 1]


class _PrunedCache:
    """What a pruned cache does differently; mixed into the class of the cache it came from."""

    layers: list[Any]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Length of the sequence: in tokens outside the decoder, in slots within it."""
        ledger: Ledger = getattr(self, _STATE)
        layer_idx = next(i for i in range(layer_idx, len(self.layers)) if hasattr(self.layers[i], "get_seq_length"))
        physical = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return physical if ledger.inside else physical + ledger.at(layer_idx).dropped

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[Any, int]:
        """Length and offset of the keys that a mask has to cover, counted as in :meth:`get_seq_length`."""
        ledger: Ledger = getattr(self, _STATE)
        if ledger.inside:
            sizes: tuple[Any, int] = super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
            return sizes
        past = int(self.get_seq_length(layer_idx))
        layer = self.layers[layer_idx]
        window = window_of(layer)
        if window is None or past < window:
            return past + query_length, 0
        return window - 1 + query_length, past - window + 1

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Store new states.

        Raises:
            InputError: the layers hold different tokens, and a decoder calls that does not count in their slots.
        """
        ledger: Ledger = getattr(self, _STATE)
        if not ledger.inside and len(ledger.parts) > 1:
            raise InputError(LAYERED)
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the name of the class that the cache came from."""
        return _rebuild, (type(self).__mro__[2],), self.__dict__

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as on an unpruned cache."""
        ledger: Ledger = getattr(self, _STATE)
        length, physical = int(self.get_seq_length()), super().get_seq_length  # type: ignore[misc]
        n_gone = length - cropped_length(length, tokens_to_remove)
        lengths = [int(physical(start)) for start in ledger.starts]
        parts = tuple(
            slots.cropped(n_slots=max(0, n_slots - n_gone))
            for slots, n_slots in zip(ledger.parts, lengths, strict=True)
        )
        super().crop(-n_gone)  # type: ignore[misc]
        ledger.parts = parts

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
        n_rows = getattr(self, _STATE).parts[0].index.shape[0]
        self._take_rows(torch.arange(n_rows).repeat_interleave(repeats))

    def _take_rows(self, rows: Tensor) -> None:
        ledger: Ledger = getattr(self, _STATE)
        ledger.parts = tuple(slots.take(rows) for slots in ledger.parts)
        ledger.shift = None if ledger.shift is None else ledger.shift[rows.to(ledger.shift.device)]
        ledger.padding = None if ledger.padding is None else ledger.padding[rows.cpu()]
        heads = ledger.head_scores
        ledger.head_scores = None if heads is None else heads[rows.to(heads.device)]
        ledger.scores = {probe: scores[rows.to(scores.device)] for probe, scores in ledger.scores.items()}


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


def ledger_of(cache: Any) -> Ledger | None:
    """The ledger of a pruned cache, None for any other cache or for no cache."""
    ledger = getattr(cache, _STATE, None)
    return ledger if isinstance(ledger, Ledger) else None


def past_length(cache: Any) -> int:
    """Tokens of the unpruned sequence that `cache` stands for; 0 without a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def cropped_length(length: int, tokens_to_remove: int) -> int:
    """How many of `length` tokens the ``crop`` of an ordinary layer leaves: its argument means what it means to the
    transformers that is installed."""
    from transformers.cache_utils import DynamicLayer

    layer = DynamicLayer()
    layer.update(*torch.empty(2, 1, 1, length, 1))
    layer.crop(tokens_to_remove)
    return int(layer.get_seq_length())


def check_cache(cache: Any, *, layered: bool = False) -> None:
    """Check that a cache can go on after pruning.

    Args:
        cache: the cache, or None.
        layered: whether its layers are to hold different tokens.

    Raises:
        UnsupportedModelError: it cannot.
    """
    if cache is not None and not hasattr(cache, "layers"):
        raise UnsupportedModelError(
            f"cannot prune with a cache of type {type(cache).__name__}; a transformers Cache made of layers works "
            "(DynamicCache, StaticCache, QuantizedCache), and so does use_cache=False"
        )
    classes = {cls.__name__ for layer in getattr(cache, "layers", ()) for cls in type(layer).__mro__}
    if layered and "QuantizedLayer" in classes:
        raise UnsupportedModelError(
            f"cannot prune between decoder layers with a {type(cache).__name__}: its layers keep one quantized block "
            "each, which pruning layer by layer would cut differently; use DynamicCache or StaticCache, or a method "
            "that prunes before the decoder"
        )


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
        earlier = torch.arange(before, device=new.device).expand(len(new), -1)
    else:
        earlier = slots.columns(n_slots=before).to(new.device)
    old_bias = None if slots is None else slots.biases(n_slots=before)
    if bias is not None or old_bias is not None:
        old_bias = torch.zeros(earlier.shape, device=new.device) if old_bias is None else old_bias.to(new.device)
        bias = torch.zeros(new.shape, device=new.device) if bias is None else bias
        bias = torch.cat([old_bias, bias], dim=1)
    dropped = past + rows.shape[1] - before - new.shape[1]
    has_fillers = (keep is not None and keep.valid is not None) or (slots is not None and slots.has_fillers)
    return Slots(torch.cat([earlier, new], dim=1), dropped, has_fillers, bias)


def record(cache: Any, ledger: Ledger) -> None:
    """Write down on `cache` which tokens its layers hold."""
    if ledger_of(cache) is None:
        cls: Any = type(cache)
        cache.__class__ = _pruned_class(cls)
    setattr(cache, _STATE, ledger)
