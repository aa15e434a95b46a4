"""The baseline that prunes nothing: the image itself made smaller, until it has about as many visual tokens.

Two ways are tried. Models that take images of any size are given a smaller image. Models of one fixed resolution are
given smaller pixels by their image processor, and their position embeddings are interpolated by their own vision
encoder, where it can. A model that was trained on one resolution answers worse then than one trained on many.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from tokenprune.errors import OptionError, TokenPruneError
from tokenprune.loading import Loaded, n_visual, prepare
from tokenprune.schedule import count

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
    if _interpolated(loaded.model) and (smaller := _smaller(loaded, scale)) is not None:
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
            f"resize: {loaded.name} turns images of every size into about {whole} visual tokens, so a smaller image "
            f"does not bring them to {wanted}"
        )
    return best[1]


def _smaller(loaded: Loaded, scale: float) -> dict[str, Any] | None:
    """Options of an image processor with a fixed `size`, for pixels so much smaller in whole patches."""
    images, vision = loaded.processor.image_processor, getattr(loaded.model.config, "vision_config", None)
    patch, size = getattr(vision, "patch_size", None), getattr(images, "size", None)
    if not isinstance(patch, int) or not size:
        return None
    names = ("height", "width", "shortest_edge")
    sides = {name: size[name] for name in names if name in size and isinstance(size[name], int)}
    if not sides:
        return None
    smaller = {name: patch * max(1, round(side * scale / patch)) for name, side in sides.items()}
    side = min(smaller.values())
    crop = {"crop_size": {"height": smaller.get("height", side), "width": smaller.get("width", side)}}
    return {"size": smaller, **(crop if getattr(images, "crop_size", None) else {})}


def _interpolated(model: nn.Module) -> list[nn.Module]:
    """Modules that can interpolate their position embeddings, if asked to."""
    name = "interpolate_pos_encoding"
    return [
        module
        for module in model.modules()
        if callable(getattr(module, name, None)) and name in inspect.signature(module.forward).parameters
    ]


@contextmanager
def interpolating(model: nn.Module) -> Iterator[None]:
    """Within the block the vision encoder interpolates its position embeddings to the size of what it is given."""

    def ask(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    handles = [module.register_forward_pre_hook(ask, with_kwargs=True) for module in _interpolated(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
