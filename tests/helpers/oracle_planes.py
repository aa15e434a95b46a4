"""What the oracle of decoding needs where a run keeps its keys and values in planes: its own roundings, each checked.

Whether a number lies just below or just above the middle of two integers is a matter of rounding, so a computation of
its own would now and then store another one. The oracle therefore takes over what the run has stored, but only for
tokens whose own keys and values are within half a step of it. What the high plane alone holds follows from that.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune.upstream.quantized_cache import PlanesLayer

Pair = tuple[Tensor, Tensor]
Recorded = dict[int, list[Pair]]


@contextmanager
def recorded_planes() -> Iterator[Recorded]:
    """Within the block the keys and values that layers in planes store are written down, by the layer's identity, as
    whoever reads all of their bits gets them."""
    found: Recorded = defaultdict(list)
    update = PlanesLayer.update

    def noting(layer: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Pair:
        keys, values = update(layer, key, value, *args, **kwargs)
        n_new = key.shape[2]
        found[id(layer)].append((keys[:, :, -n_new:].clone(), values[:, :, -n_new:].clone()))
        return keys, values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlanesLayer, "update", noting)
        yield found


def stored_by(cache: Any, recorded: Recorded, row: int) -> dict[int, Pair]:
    """For each layer of `cache` that is in planes the keys and values `[Hkv, T, K]` that were ever stored of a row."""
    return {
        number: tuple(torch.cat([pair[i][row] for pair in recorded[id(layer)]], 1) for i in range(2))
        for number, layer in enumerate(getattr(cache, "layers", ()))
        if id(layer) in recorded
    }


def as_stored(key: Tensor, value: Tensor, which: Tensor, stored: Pair) -> tuple[Pair, Pair]:
    """Keys and values `[Hkv, L, K]` as they are read: by both planes, and by the high one alone.

    Args:
        key: `[Hkv, L, K]`, the oracle's own.
        value: likewise.
        which: `[L]` bool, the tokens that were stored.
        stored: what the run has stored of this row, tokens in any order.
    """
    own = key[:, which].transpose(0, 1).flatten(1)
    theirs = stored[0].transpose(0, 1).flatten(1).to(own)
    slots = torch.cdist(own, theirs, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    both, high = [], []
    for mine, found in zip((key, value), stored, strict=True):
        found = found[:, slots].to(mine)
        step = mine[:, which].abs().amax(-1, keepdim=True) / 127
        assert bool(((mine[:, which] - found).abs() <= 0.51 * step).all()), "what was stored is not what came"
        step = found.abs().amax(-1, keepdim=True) / 127
        whole = (found / step.clamp(min=1e-30)).round() + 128
        upper = (whole.div(16, rounding_mode="floor") * 16 + 7.5 - 128) * step
        for planes, read in ((both, found), (high, upper)):
            planes.append(mine.clone())
            planes[-1][:, which] = read
    return (both[0], both[1]), (high[0], high[1])
