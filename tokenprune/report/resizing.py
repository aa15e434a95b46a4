"""The baseline that prunes nothing: the image itself made smaller, until it has about as many visual tokens.

Two ways are tried. Models that take images of any size are given a smaller image. Models of one fixed resolution are
given smaller pixels by their image processor, and their position embeddings are interpolated by their own vision
encoder, where it can. A model that was trained on one resolution answers worse then than one trained on many.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from tokenprune.errors import OptionError, TokenPruneError
from tokenprune.report.loading import Loaded, n_visual, prepare
from tokenprune.schedule import count
from tokenprune.upstream.loading import ask_to_interpolate, interpolators, smaller_pixels

if TYPE_CHECKING:
    from PIL import Image

NEAR = 0.35


def resized_inputs(loaded: Loaded, image: "Image.Image", question: str, *, keep: float) -> dict[str, Any]:
    """Inputs of ``generate`` whose image is so much smaller that about `keep` of its visual tokens are left.

    Run them inside :func:`interpolating`.

    Raises:
        OptionError: neither way comes near that number of tokens with this model.
    """
    whole = n_visual(loaded.model, prepare(loaded, image, question))
    wanted = count(keep, whole)
    scale = math.sqrt(wanted / whole) if whole else 1.0
    width, height = (max(1, round(side * scale)) for side in image.size)
    ways: list[tuple[Any, dict[str, Any]]] = [(image.resize((width, height)), {})]
    smaller = smaller_pixels(loaded.model, loaded.processor, scale) if interpolators(loaded.model) else None
    if smaller is not None:
        ways.append((image, smaller))
    found = []
    for picture, options in ways:
        try:
            inputs = prepare(loaded, picture, question, **options)
        except TokenPruneError:
            continue
        found.append((abs(n_visual(loaded.model, inputs) - wanted), inputs))
    best = min(found, key=lambda pair: pair[0], default=None)
    if best is None or best[0] > max(1.0, NEAR * wanted):
        raise OptionError(
            f"{loaded.name} turns images of every size into about {whole} visual tokens, so a smaller image "
            f"does not bring them to {wanted}"
        )
    return best[1]


@contextmanager
def interpolating(model: nn.Module) -> Iterator[None]:
    """Within the block the vision encoder interpolates its position embeddings to the size of what it is given."""

    def ask(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, ask_to_interpolate(kwargs)

    handles = [module.register_forward_pre_hook(ask, with_kwargs=True) for module in interpolators(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
