"""The adapter for the vision encoder that a model is or holds."""

from torch import nn

from tokenprune.encoder.adapter import EncoderAdapter
from tokenprune.errors import UnsupportedModelError
from tokenprune.upstream.encoders import towers_of


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
    return EncoderAdapter(host, tower)
