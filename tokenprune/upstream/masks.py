"""The masks that a decoder would build, by upstream's own function."""

from typing import Any

import torch
from torch import Tensor

from tokenprune.upstream.calls import check_roles, names_of
from tokenprune.upstream.check import need
from tokenprune.upstream.facts import DecoderFacts

_NAME = "create_masks_for_generate"


def _builder() -> tuple[Any, dict[str, str]]:
    """The function that builds masks, and what it calls its arguments."""
    build = need("transformers.masking_utils", _NAME, role="function that builds masks")
    return build, check_roles(names_of(build), ("config", "embeds", "mask", "positions", "cache"), of=_NAME)


def check_builder() -> None:
    """Check that masks can be built.

    Raises:
        UnsupportedModelError: they cannot.
    """
    _builder()


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
    build, names = _builder()
    given = {"config": facts.config, "embeds": empty, "mask": mask, "positions": positions, "cache": cache}
    return build(**{names[role]: value for role, value in given.items()})
