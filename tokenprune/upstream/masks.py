"""The masks that a decoder would build, by upstream's own function."""

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokenprune.upstream.calls import CACHE
from tokenprune.upstream.check import missing, need
from tokenprune.upstream.facts import DecoderFacts

_MODULE, _NAME = "transformers.masking_utils", "create_masks_for_generate"


def _builder() -> Any:
    return need(_MODULE, _NAME, role="function that builds masks")


def check_builder() -> None:
    """Check that masks can be built.

    Raises:
        UnsupportedModelError: they cannot.
    """
    _arguments(_builder())


@lru_cache(maxsize=4)
def _arguments(build: Any) -> str:
    names = inspect.signature(build).parameters
    found = next((name for name in CACHE if name in names), None)
    for name in ("config", "inputs_embeds", "attention_mask", "position_ids"):
        if name not in names:
            raise missing("argument", of=_NAME, wanted=[name], seen=names)
    if found is None:
        raise missing("argument for the KV cache", of=_NAME, wanted=CACHE, seen=names)
    return found


def dense_mask(
    facts: DecoderFacts, mask: Tensor | None, cache: Any, *, past: int, embeds: Tensor, positions: Tensor
) -> Any:
    """The masks that the decoder would build for the unpruned sequence, by the public function that ``generate`` uses
    for it: a tensor, None, or a dict of these by kind of layer.

    Args:
        facts: the decoder's.
        mask: 2-D padding mask `[B, past + L]` or None.
        cache: the cache, or None.
        past: tokens of the unpruned sequence before the call.
        embeds: `[B, L, D]`, for its shape, dtype and device.
        positions: `[B, L]`.
    """
    empty = embeds.new_empty(embeds.shape[0], embeds.shape[1], 0)
    if mask is None:  # without a mask and a cache, gaps in the positions would be taken for packed sequences
        mask = embeds.new_ones(embeds.shape[0], embeds.shape[1] + past, dtype=torch.int64)
    build = _builder()
    given = {
        "config": facts.config,
        "inputs_embeds": empty,
        "attention_mask": mask,
        "position_ids": positions,
        _arguments(build): cache,
    }
    return build(**given)
