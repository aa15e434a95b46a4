"""A KV cache in two planes of four bits (progressive quantization, SpAtten, arXiv 2012.09852, III-D).

:class:`PlanesLayer` is a layer of transformers' own caches: a subclass of its ``DynamicLayer`` that keeps its tokens as
:class:`tokenprune.ops.Planes`. Whatever reads it through ``update`` gets both planes, dequantized, so that every
attention works; ``planes`` hands them out for :func:`tokenprune.ops.decode_attention`, which reads less.

What is read is what is stored, by the call that brings a token too: a prompt in chunks gives the same as the prompt at
once, and every key and value is a function of the token alone.

The class needs transformers, which importing tokenprune must not: it is made when it is first asked for.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from tokenprune.errors import UnsupportedModelError
from tokenprune.ops import Planes, dequantize_planes, quantize_planes
from tokenprune.upstream.caches import cropped_length
from tokenprune.upstream.check import need


class _PlanesLayer:
    """What a layer in planes does differently; mixed into ``DynamicLayer``, whose own `keys` and `values` stay empty
    and tell the dtype of the states."""

    is_initialized: bool
    device: torch.device
    keys: Tensor
    # The tensors of both planes, None before the first states. Named as transformers names what a quantized layer
    # holds, and plain tuples, which tree utilities look into.
    _quantized_keys: Any = None
    _quantized_values: Any = None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new states `[B, Hkv, n, K]` and return all of them, `[B, Hkv, L, K]`, as they are stored.

        Raises:
            InputError: the width of a head is odd.
        """
        stored = _stored(key_states), _stored(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        if self._quantized_keys is not None:
            past = self._quantized_keys, self._quantized_values
            stored = tree_map(lambda *both: torch.cat(both, 2), past, stored)
        self._quantized_keys, self._quantized_values = stored
        keys, values = self.planes()
        return dequantize_planes(keys, dtype=self.keys.dtype), dequantize_planes(values, dtype=self.keys.dtype)

    def planes(self) -> tuple[Planes, Planes]:
        """Keys and values `[B, Hkv, L, K]`."""
        return Planes(*self._quantized_keys), Planes(*self._quantized_values)

    def take(self, index: Tensor) -> None:
        """Keep some tokens.

        Args:
            index: `[B, M]` int64, slots to keep, ascending. It may stand on another device.
        """

        def gather(x: Tensor) -> Tensor:
            place = index.to(x.device).view(len(index), 1, -1, *[1] * (x.ndim - 3))
            return x.gather(2, place.expand(-1, x.shape[1], -1, *x.shape[3:]))

        self._each(gather)

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return 0 if self._quantized_keys is None else self._quantized_keys[2].shape[-1]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as many as of an ordinary layer."""
        left = cropped_length(self.get_seq_length(), tokens_to_remove)
        self._each(lambda x: x[:, :, :left].clone())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self._quantized_keys = self._quantized_values = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the device of the states."""
        self._each(lambda x: x.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change all tensors of the planes, along axes that all of them have."""
        stored = self._quantized_keys, self._quantized_values
        self._quantized_keys, self._quantized_values = tree_map_only(Tensor, change, stored)


def _stored(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    planes = quantize_planes(states)
    return planes.high, planes.low, planes.scale


def _growing_layer() -> Any:
    return need("transformers.cache_utils", "DynamicLayer", role="layer of a KV cache that grows")


@functools.cache
def _layer_class() -> Any:
    return type(
        "PlanesLayer", (_PlanesLayer, _growing_layer()), {"__module__": __name__, "__doc__": _PlanesLayer.__doc__}
    )


def __getattr__(name: str) -> Any:
    """``PlanesLayer``, made when it is first asked for; pickle asks for it by name too."""
    if name == "PlanesLayer":
        return _layer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def use_planes(cache: Any) -> None:
    """Let the growing full-attention layers of an empty cache keep their tokens in planes; others stay as they are.

    Args:
        cache: a ``DynamicCache`` of transformers, with or without a config.

    Raises:
        UnsupportedModelError: the cache has no such layer, or holds tokens already; it is left as it was.
    """
    growing = _growing_layer(), _layer_class()
    layers, grows = getattr(cache, "layers", []), getattr(cache, "layer_class_to_replicate", None) in growing
    places = [i for i, layer in enumerate(layers) if type(layer) in growing]
    if not places and (layers or not grows):
        raise UnsupportedModelError(
            f"no layer of this {type(cache).__name__} can keep its tokens in two planes of four bits; growing layers "
            "of full attention can, as a DynamicCache has them"
        )
    if any(layers[i].get_seq_length() for i in places):
        raise UnsupportedModelError(
            f"this {type(cache).__name__} holds {layers[places[0]].get_seq_length()} tokens already; quantizing starts "
            "with an empty cache"
        )
    for i in places:
        layers[i] = _layer_class()()
    if grows:
        cache.layer_class_to_replicate = _layer_class()
