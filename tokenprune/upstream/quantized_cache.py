"""A KV cache in two planes of four bits (progressive quantization, SpAtten, arXiv 2012.09852, III-D).

:class:`PlanesLayer` is a layer of transformers' own caches: a subclass of its ``DynamicLayer`` that keeps all but the
newest tokens as :class:`tokenprune.ops.Planes`. Whatever reads it through ``update`` gets both planes, dequantized, so
that every attention works; ``planes`` hands them out for :func:`tokenprune.ops.decode_attention`, which reads less.

What is read is what is stored, by the call that brings a token too: with ``residual=0`` a prompt in chunks gives the
same as the prompt at once, and every key and value is a function of the token alone.

The class needs transformers, which importing tokenprune must not: it is made when it is first asked for.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from tokenprune.errors import OptionError, UnsupportedModelError
from tokenprune.ops import Planes, dequantize_planes, quantize_planes
from tokenprune.upstream.caches import cropped_length
from tokenprune.upstream.check import need

_PLANES = ("_quantized_keys", "_quantized_values")
_NEWEST = ("keys", "values")


class _PlanesLayer:
    """What a layer in planes does differently; mixed into ``DynamicLayer``.

    Attributes:
        residual: how many of the newest tokens stay as they came.
        keys: `[B, Hkv, R, K]`, the keys that stayed as they came.
        values: `[B, Hkv, R, K]` likewise.
    """

    is_initialized: bool
    keys: Tensor
    values: Tensor
    # The tensors of planes, None before the first states. Named as transformers names what a quantized layer holds, and
    # plain tuples, which tree utilities look into.
    _quantized_keys: Any
    _quantized_values: Any

    def __init__(self, *, residual: int = 0) -> None:
        """An empty layer.

        Args:
            residual: how many of the newest tokens stay as they came.

        Raises:
            OptionError: it is negative.
        """
        if isinstance(residual, bool) or not isinstance(residual, int) or residual < 0:
            raise OptionError(f"a layer in planes needs an int from 0 on as residual; got {residual!r}.")
        super().__init__()
        self.residual = residual
        self._quantized_keys = self._quantized_values = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over dtype, device and shapes from the first states."""
        super().lazy_initialization(key_states, value_states)  # type: ignore[misc]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._quantized_keys, self._quantized_values = _store(self.keys), _store(self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new states `[B, Hkv, n, K]` and return all of them, `[B, Hkv, L, K]`, as they are stored: quantized,
        but for the newest.

        Raises:
            InputError: the width of a head is odd.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        self._quantize(max(0, self.keys.shape[-2] - self.residual))
        keys, values = self._past()
        return (
            torch.cat([dequantize_planes(keys, dtype=self.keys.dtype), self.keys], dim=-2),
            torch.cat([dequantize_planes(values, dtype=self.keys.dtype), self.values], dim=-2),
        )

    def planes(self) -> tuple[Planes, Planes]:
        """Keys and values `[B, Hkv, L, K]`, all of them in planes; from now on the newest ones are too."""
        self._quantize(self.keys.shape[-2])
        return self._past()

    def take(self, index: Tensor) -> None:
        """Keep some tokens; unless the newest ones stay where they are, they are quantized before.

        Args:
            index: `[B, M]` int64, slots to keep, ascending. It may stand on another device.
        """
        index = index.to(self.keys.device)
        tail = self.keys.shape[-2]
        end = self.get_seq_length()
        newest = torch.arange(end - tail, end, dtype=torch.int64, device=index.device)
        if tail and (index.shape[1] < tail or not torch.equal(index[:, -tail:], newest.expand(len(index), -1))):
            self._quantize(tail)
            tail = 0
        old = index[:, : index.shape[1] - tail, None]

        def gather(x: Tensor) -> Tensor:
            place = old if x.ndim == 4 else old[..., 0]
            return x.gather(2, place.unsqueeze(1).expand(-1, x.shape[1], *place.shape[1:2], *x.shape[3:]))

        self._each(gather, _PLANES)

    def get_seq_length(self) -> int:
        """Tokens stored."""
        past = self._quantized_keys
        return past[2].shape[-1] + self.keys.shape[-2] if self.is_initialized and past is not None else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as many as of an ordinary layer."""
        length = self.get_seq_length()
        left = cropped_length(length, tokens_to_remove)
        past = length - self.keys.shape[-2] if length else 0
        if left < length:
            self._each(lambda x: x[:, :, :left].clone(), _PLANES)
            self._each(lambda x: x[:, :, : max(0, left - past)].clone(), _NEWEST)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self._quantized_keys = self._quantized_values = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows as beam search does."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

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
        self._each(lambda x: x.to(self.device, non_blocking=True))  # type: ignore[attr-defined]

    def _past(self) -> tuple[Planes, Planes]:
        return Planes(*self._quantized_keys), Planes(*self._quantized_values)

    def _quantize(self, n_tokens: int) -> None:
        """Move the oldest of the tokens that stayed as they came to the planes."""
        if n_tokens == 0:
            return
        new = _store(self.keys[:, :, :n_tokens]), _store(self.values[:, :, :n_tokens])
        past = self._quantized_keys, self._quantized_values
        self._quantized_keys, self._quantized_values = tree_map(lambda *both: torch.cat(both, 2), past, new)
        self._each(lambda x: x[:, :, n_tokens:].clone(), _NEWEST)

    def _each(self, change: Callable[[Tensor], Tensor], parts: tuple[str, ...] = (*_PLANES, *_NEWEST)) -> None:
        """Change all tensors of some parts, of which there are none before the first states."""
        for part in parts:
            setattr(self, part, tree_map_only(Tensor, change, getattr(self, part)))


def _store(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def use_planes(cache: Any, *, residual: int = 0) -> None:
    """Let the growing full-attention layers of an empty cache keep their tokens in planes; others stay as they are.

    Args:
        cache: a ``DynamicCache`` of transformers, with or without a config.
        residual: how many of the newest tokens stay as they came.

    Raises:
        OptionError: `residual` is negative.
        UnsupportedModelError: the cache has no such layer, or holds tokens already; it is left as it was.
    """
    growing = _growing_layer(), _layer_class()
    new = functools.partial(growing[1], residual=residual)
    layers, more = getattr(cache, "layers", []), getattr(cache, "layer_class_to_replicate", None)
    grows = getattr(more, "func", more) in growing
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
    new()  # Raises before anything is changed.
    for i in places:
        layers[i] = new()
    if grows:
        cache.layer_class_to_replicate = new
