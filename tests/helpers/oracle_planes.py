"""What the layered oracle needs where a run keeps its keys and values in planes: its own roundings, each one checked.

Whether a number lies just below or just above the middle of two integers is a matter of rounding, so a computation of
its own would now and then store another one. The oracle therefore takes over what the run has stored, but only for
tokens whose own keys and values are within half a step of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle_layers import layers_of
from torch import Tensor, nn
from upstream import with_cache

from tokenprune.ops import dequantize_planes

Stored = dict[int, tuple[Tensor, Tensor]]


def stored_by(cache: Any, row: int) -> Stored:
    """Keys and values `[Hkv, M, K]` of a row for each layer of a cache that keeps them in planes."""
    found = {}
    for number, layer in enumerate(cache.layers):
        if hasattr(layer, "planes"):
            found[number] = tuple(dequantize_planes(one)[row] for one in layer.planes())
    return found


class _Given:
    """Stands for a cache: hands out what was stored of the tokens that are left, and all others as they come."""

    def __init__(self, stored: Stored, alive: list[Tensor]) -> None:
        self.stored, self.alive, self.asked = stored, alive, set[int]()

    def update(self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.asked.add(layer)
        if layer not in self.stored:
            return key, value
        places = self.alive[layer].nonzero()[:, 0]
        keys, values = self.stored[layer]
        own = key[0, :, places].transpose(0, 1).flatten(1)
        slots = torch.cdist(own, keys.transpose(0, 1).flatten(1), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        changed = []
        for come, there in ((key, keys), (value, values)):
            mine, theirs = come[0, :, places], there[:, slots]
            step = mine.abs().amax(-1, keepdim=True) / 127
            assert bool(((mine - theirs).abs() <= 0.51 * step).all()), "what was stored is not what came"
            come = come.clone()
            come[0, :, places] = theirs
            changed.append(come)
        return changed[0], changed[1]


@contextmanager
def as_stored(model: nn.Module, stored: Stored, alive: list[Tensor]) -> Iterator[None]:
    """Within the block the layers of the unpatched `model`, on a single unpadded row, read what was `stored`."""
    given = _Given(stored, alive)

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, **with_cache(given)}

    handles = [
        layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers_of(model.get_decoder()) if stored
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert set(stored) <= given.asked
