"""What a multimodal model itself is called with: the text, and what tells of images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.upstream.calls import bind

_ENCODED = "mm_encoder_outputs"
_PIXELS = "pixel_values"
_FEATURES = ("image_hidden_states", "image_embeds")
_IDS, _EMBEDS, _SIZES = "input_ids", "inputs_embeds", "image_sizes"


@dataclass
class Prompt:
    """The arguments of a call of the module that holds the text decoder.

    Attributes:
        given: its keyword arguments, by upstream's names.
    """

    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Prompt":
        """What `module` is being called with."""
        return cls(bind(module.forward, args, kwargs))

    @classmethod
    def of(cls, ids: Tensor, *, features: Tensor | None = None) -> "Prompt":
        """A prompt of ids `[B, L]`, with image features or without."""
        return cls({_IDS: ids} if features is None else {_IDS: ids, _PIXELS: features})

    @property
    def ids(self) -> Tensor | None:
        """Token ids `[B, L]`, None where embeddings were given."""
        ids = self.given.get(_IDS)
        return ids if isinstance(ids, Tensor) else None

    @property
    def embeds(self) -> Tensor | None:
        """Embeddings `[B, L, D]`, None where ids were given."""
        embeds = self.given.get(_EMBEDS)
        return embeds if isinstance(embeds, Tensor) else None

    @property
    def names(self) -> list[str]:
        """Names of the arguments that hold something."""
        return [name for name, value in self.given.items() if value is not None]

    @property
    def has_features(self) -> bool:
        """Whether image or video features come in, as pixels or encoded already.

        Placeholders are looked for in such calls only: one that was *generated* looks just like an image's.
        """
        if any(value is not None for value in (self.given.get(_ENCODED) or {}).values()):
            return True
        return any(
            value is not None and (name.startswith(_PIXELS) or name in _FEATURES) for name, value in self.given.items()
        )

    def encoded(self, *, video: bool) -> Any:
        """What the vision encoder gave: a tensor, a sequence of tensors (one for each image), or None."""
        output = (self.given.get(_ENCODED) or {}).get("video" if video else "image")
        return getattr(output, "pooler_output", None)

    def encoded_sizes(self, *, video: bool, stacked: bool) -> list[int] | None:
        """Tokens of each image as the vision encoder gave them; None where it was not run before.

        Args:
            video: whether videos are asked for.
            stacked: whether `[n, N, D]` has a row for each image.
        """
        features = self.encoded(video=video)
        if isinstance(features, Tensor):
            return [features.shape[1]] * features.shape[0] if features.ndim == 3 and stacked else []
        if isinstance(features, Sequence):
            return [math.prod(image.shape[:-1]) for image in features]
        return None

    @property
    def pixel_sizes(self) -> list[tuple[int, int]] | None:
        """Height and width of each image in pixels, where they are told."""
        sizes = self.given.get(_SIZES)
        return None if sizes is None else [(int(h), int(w)) for h, w in torch.as_tensor(sizes).tolist()]

    def n_images(self, *, video: bool) -> int | None:
        """How many images (or frames) the pixels hold; None where they do not tell."""
        pixels = self.given.get(f"{_PIXELS}_videos" if video else _PIXELS)
        return math.prod(pixels.shape[:-3]) if isinstance(pixels, Tensor) and pixels.ndim >= 4 else None
