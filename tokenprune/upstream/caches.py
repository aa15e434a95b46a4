"""The protocol of KV caches: how long they are, what their layers hold, and how one becomes a pruned one.

A pruned cache holds fewer slots than the sequence has tokens. Its class becomes a subclass of its own class
(:class:`_PrunedCache`) whose answers are *logical* (tokens of the unpruned sequence) outside the decoder's forward and
*physical* (slots) within it. What it knows of its slots is a :class:`Slotted` object that sits on it.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.reduction import gather
from tokenprune.upstream.calls import CACHE, parts_of
from tokenprune.upstream.check import look_up, missing, need, need_attributes
from tokenprune.upstream.slotted import Slotted

LAYERED = (
    "this cache was pruned layer by layer, and the model is not patched with a method that does so; patch it as it was "
    "when the cache was made"
)
_UNPATCHED = (
    "this cache was pruned, and the model is not patched: it counts tokens that the cache does not hold; patch it "
    "again with any method, and continue within session.pause() if nothing more is to be pruned"
)
_MODULE = "transformers.cache_utils"
_LENGTH = "get_seq_length"
_ASKED = (
    _LENGTH,
    "get_mask_sizes",
    "update",
    "crop",
    "reset",
    "reorder_cache",
    "batch_select_indices",
    "batch_repeat_interleave",
)
"""What a cache and each of its layers are asked for."""
_PAGED = "PagedAttentionCache"
_KINDS = (
    "a transformers Cache made of layers works (DynamicCache, StaticCache, QuantizedCache), and so does use_cache=False"
)


class _PrunedCache:
    """What a pruned cache does differently; mixed into the class of the cache it came from."""

    layers: list[Any]
    _tokenprune_slots: Slotted

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """Length of the sequence: in tokens outside the decoder, in slots within it."""
        given = (*args, *kwargs.values())  # one argument, whatever it is called
        layer = next(i for i in range(given[0] if given else 0, len(self.layers)) if hasattr(self.layers[i], _LENGTH))
        physical = super().get_seq_length(layer)  # type: ignore[misc]
        return physical if self._tokenprune_slots.inside else physical + self._tokenprune_slots.dropped_at(layer)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[Any, int]:
        """Length and offset of the keys that a mask has to cover, counted as in :meth:`get_seq_length`."""
        ask: Any = super().get_mask_sizes  # type: ignore[misc]
        if self._tokenprune_slots.inside:
            return cast("tuple[Any, int]", ask(*args, **kwargs))
        n_queries, layer = inspect.signature(ask).bind(*args, **kwargs).arguments.values()
        past = int(self.get_seq_length(layer))
        window = window_of(self.layers[layer])
        first = 0 if window is None else max(0, past - window + 1)
        return past + n_queries - first, first

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Store new states.

        Raises:
            InputError: a decoder calls that does not count in the slots.
        """
        _check_writer(self._tokenprune_slots)
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """Store new states of a recurrent layer, as :meth:`update` does."""
        _check_writer(self._tokenprune_slots)
        return super().update_conv_state(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the name of the class that the cache came from."""
        return _rebuild, (type(self).__mro__[2],), self.__dict__

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens, as on an unpruned cache."""
        length = int(self.get_seq_length())
        n_gone = length - cropped_length(length, *args, *kwargs.values())
        finish = self._tokenprune_slots.crop(n_gone, super().get_seq_length)  # type: ignore[misc]
        super().crop(-n_gone)  # type: ignore[misc]
        finish()

    def reset(self) -> None:
        """Empty the cache; it is an ordinary one again."""
        super().reset()  # type: ignore[misc]
        forget(self)

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        """Take rows as beam search does."""
        super().reorder_cache(*args, **kwargs)  # type: ignore[misc]
        self._tokenprune_slots.take_rows(*args, *kwargs.values())

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        """Keep some rows."""
        super().batch_select_indices(*args, **kwargs)  # type: ignore[misc]
        self._tokenprune_slots.take_rows(*args, *kwargs.values())

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(*args, **kwargs)  # type: ignore[misc]
        rows = torch.arange(self._tokenprune_slots.n_rows, dtype=torch.int64, device="cpu")
        self._tokenprune_slots.take_rows(rows.repeat_interleave(*args, *kwargs.values()))


def _check_writer(slots: Slotted) -> None:
    """Check that who stores states in a pruned cache counts in its slots.

    Raises:
        InputError: it is the decoder of a model that is not patched, or not as it was.
    """
    if slots.inside:
        return
    if slots.layered or slots.differ:
        raise InputError(LAYERED if slots.layered else _UNPATCHED)
    slots.length = None  # somebody else writes, who does not say how much


@functools.cache
def _pruned_class(cls: type) -> type:
    return type(f"Pruned{cls.__name__}", (_PrunedCache, cls), {"__module__": __name__})


def _rebuild(cls: Any) -> Any:
    return object.__new__(_pruned_class(cls))


@functools.cache
def check_classes() -> None:
    """Check that upstream's caches have what pruning works with. Looked at once.

    Raises:
        UnsupportedModelError: they have not.
    """
    need_attributes(need(_MODULE, "Cache", role="KV cache"), _ASKED, role="function of the KV cache")
    layer = need(_MODULE, "DynamicLayer", role="layer of a KV cache")()
    wanted = (*_ASKED, "keys", "values", "is_initialized", "is_sliding", "lazy_initialization")
    need_attributes(layer, wanted, role="attribute of a layer of the KV cache")


def slots_of(cache: Any) -> Any:
    """What a pruned cache knows of its slots, None for any other cache or for no cache."""
    return getattr(cache, "_tokenprune_slots", None)


def record(cache: Any, slots: Slotted) -> None:
    """Write down on `cache` which tokens its layers hold; from now on it is a pruned one."""
    if slots_of(cache) is None:
        cls: Any = type(cache)
        cache.__class__ = _pruned_class(cls)
    cache._tokenprune_slots = slots


def forget(cache: Any) -> None:
    """Make a pruned cache an ordinary one."""
    del cache._tokenprune_slots
    cache.__class__ = type(cache).__mro__[2]


def is_cache(thing: object) -> bool:
    """Whether a thing is a KV cache of transformers."""
    return isinstance(thing, need(_MODULE, "Cache", role="KV cache"))


def cache_in(output: Any) -> Any:
    """The KV cache among what a decoder returned, under whatever name; None where there is none."""
    return next((part for part in parts_of(output).values() if is_cache(part)), None)


def no_cache(called: str, output: Any) -> UnsupportedModelError:
    """The error for a decoder that was to keep a cache and returned none."""
    return missing("KV cache", of=f"what {called} returned", wanted=CACHE, seen=parts_of(output))


def layers_of(cache: Any) -> Sequence[Any]:
    """The layers of a cache; those of a cache that grows as it is used are not all there before."""
    return getattr(cache, "layers", ()) if cache is not None else ()


def past_length(cache: Any) -> int:
    """Tokens of the unpruned sequence that `cache` represents; 0 without a cache.

    Raises:
        InputError: it is of an unknown kind.
    """
    if cache is None:
        return 0
    if any(cls.__name__ == _PAGED for cls in type(cache).__mro__):
        raise InputError(
            "continuous batching (generate_batch) packs several sequences into one row with a paged KV cache, which "
            "pruning does not respect; use generate, or tokenprune.unpatch(model) first"
        )
    if not hasattr(cache, _LENGTH):
        raise InputError(f"the KV cache is a {type(cache).__name__}, which does not tell its length; {_KINDS}")
    return int(cache.get_seq_length())


def stored_length(layer: Any) -> int | None:
    """Slots of one layer of a cache; None where it has none (linear attention) or where the device would have to be
    waited for."""
    length = layer.get_seq_length() if hasattr(layer, _LENGTH) else None
    if isinstance(length, Tensor) and length.device.type != "cpu":
        return None
    return None if length is None else int(length)


def layer_mask_sizes(cache: Any, length: int, layer: int) -> tuple[int, int]:
    """Number and first slot of the keys that `layer` looks at when `length` more slots come, straight from the
    cache's layer."""
    layers = layers_of(cache)
    if layer >= len(layers):
        return length, 0
    n_keys, first = layers[layer].get_mask_sizes(length)
    return int(n_keys), int(first)


def grows(cache: Any) -> bool:
    """Whether the layers of a cache are known to hold all tokens that they were given, with no room for more."""
    return {type(layer).__name__ for layer in layers_of(cache)} == {"DynamicLayer"}


def first_key(cache: Any, length: int, layer: int) -> int:
    """Position in the unpruned sequence of the first key that the mask of `layer` covers when `length` more tokens
    come; asked of the whole cache, so before the decoder runs."""
    layers = layers_of(cache)
    return int(cache.get_mask_sizes(length, layer)[1]) if layer < len(layers) else 0


def window_of(layer: Any) -> int | None:
    """Sliding window of a cache layer in slots, or None for a layer that keeps everything."""
    if not getattr(layer, "is_sliding", False):
        return None
    return int(look_up(layer, "sliding_window", "max_cache_len", role="window"))


def cropped_length(length: int, tokens_to_remove: int) -> int:
    """How many of `length` tokens the ``crop`` of an ordinary layer leaves: its argument means what it means to the
    transformers that is installed."""
    layer = need(_MODULE, "DynamicLayer", role="layer of a KV cache")()
    layer.update(*torch.empty(2, 1, 1, length, 1, dtype=torch.float32, device="cpu"))
    layer.crop(tokens_to_remove)
    return int(layer.get_seq_length())


def new_cache(config: Any) -> Any:
    """The cache that ``generate`` makes for a decoder."""
    return need(_MODULE, "DynamicCache", role="KV cache that grows")(config=config)


def check_cache(cache: Any, *, layered: bool = False) -> None:
    """Check that a cache can be continued after pruning.

    Args:
        cache: the cache, or None.
        layered: whether its layers are to hold different tokens.

    Raises:
        UnsupportedModelError: it cannot.
    """
    if cache is not None and not hasattr(cache, "layers"):
        raise UnsupportedModelError(f"cannot prune with a cache of type {type(cache).__name__}; {_KINDS}")
    classes = {cls.__name__ for layer in layers_of(cache) for cls in type(layer).__mro__}
    if layered and "QuantizedLayer" in classes:
        raise UnsupportedModelError(
            f"cannot prune between decoder layers with a {type(cache).__name__}: its layers keep one quantized block "
            "each, which pruning layer by layer would cut differently; use DynamicCache or StaticCache, or a method "
            "that prunes before the decoder"
        )


def keep_slots(layer: Any, index: Tensor, n_slots: int) -> None:
    """Leave only the slots `index` `[B, M]` of the `n_slots` in a layer of a cache."""
    if hasattr(layer, "take"):  # one of ours
        layer.take(index)
        return
    is_static = layer.keys.shape[2] != n_slots  # it keeps its storage
    for name in ("keys", "values"):
        states = getattr(layer, name)
        kept = gather(states[:, :, :n_slots].transpose(1, 2), index).transpose(1, 2)
        if is_static:
            states[:, :, : index.shape[1]] = kept
        else:
            setattr(layer, name, kept.contiguous())
    if is_static:
        layer.cumulative_length.fill_(index.shape[1])
