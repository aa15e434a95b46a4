"""Which vision encoder a model is or holds, found by the names of the classes it descends from."""

from torch import nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.models import hf_vit, timm_vit
from tokenprune.models.encoder import EncoderAdapter
from tokenprune.models.tower import Tower

TOWERS: tuple[Tower, ...] = (*timm_vit.TOWERS, *hf_vit.TOWERS)


def find_encoder(model: nn.Module) -> EncoderAdapter | None:
    """The adapter for the vision encoder that `model` is or holds, None where there is none that is known.

    Raises:
        UnsupportedModelError: the encoder is of a kind that cannot be reduced, or there are several.
    """
    found = towers_of(model)
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} vision encoders "
            f"({', '.join(type(host).__name__ for host, _ in found)}); patch one of them, such as model.vision_model"
        )
    if not found:
        return None
    host, tower = found[0]
    if reason := tower.refusal(host):
        raise UnsupportedModelError(f"{type(host).__name__} cannot be reduced: {reason}")
    if not tower.blocks(host):
        raise UnsupportedModelError(f"{type(host).__name__} has no blocks at {' or '.join(tower.paths)}")
    return EncoderAdapter(host, tower)


def towers_of(model: nn.Module) -> list[tuple[nn.Module, Tower]]:
    """The vision encoders that `model` is or holds, with their rows."""
    found: list[tuple[nn.Module, Tower]] = []
    for module in model.modules():
        tower = next((row for row in TOWERS if _descends(module, row)), None)
        if tower is not None and not any(module in set(host.modules()) for host, _ in found):
            found.append((module, tower))
    return found


def encoder_refusal(model: nn.Module) -> str | None:
    """Why the vision encoder that `model` is cannot be reduced; None where nothing is known against it."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("timm.") and cls.__name__ in timm_vit.REFUSED:
            return timm_vit.REFUSED[cls.__name__]
        prefix = cls.__name__.removesuffix("PreTrainedModel")
        if cls.__name__.endswith("PreTrainedModel") and prefix in hf_vit.REFUSED:
            return hf_vit.REFUSED[prefix]
    return None


def _descends(module: nn.Module, tower: Tower) -> bool:
    classes = type(module).__mro__
    return any(cls.__name__ in tower.hosts and cls.__module__.partition(".")[0] == tower.library for cls in classes)
