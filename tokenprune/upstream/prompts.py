"""What a multimodal model itself is called with: the text, and what tells of images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.upstream.calls import LOGITS, bind, parameters_of

_ENCODED = "mm_encoder_outputs"
_PIXELS = "pixel_values"
_FEATURES = ("image_hidden_states", "image_embeds")
_IDS, _EMBEDS, _SIZES, _ROW_IMAGES = "input_ids", "inputs_embeds", "image_sizes", "batch_num_images"
_IMAGE_PIXELS, _VIDEO_PIXELS = (_PIXELS, f"{_PIXELS}_images"), (f"{_PIXELS}_videos",)
_GRIDS = {False: ("image_grid_thw", "image_grids"), True: ("video_grid_thw", "video_grids")}


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
        return cls(bind(parameters_of(module), args, kwargs))

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
    def n_logits(self) -> int | None:
        """Of how many of the last tokens logits are asked for; None: of all, or of tokens that are listed."""
        wanted = self.given.get(LOGITS)
        return wanted if isinstance(wanted, int) and wanted > 0 else None

    @property
    def names(self) -> list[str]:
        """Names of the arguments that hold something."""
        return [name for name, value in self.given.items() if value is not None]

    @property
    def has_features(self) -> bool:
        """Whether image or video features come in, as pixels or encoded already.

        Placeholders are looked for in such calls only: one that was *generated* looks just like an image's.
        """
        encoded = (self.given.get(_ENCODED) or {}).values()
        pixels = (value for name, value in self.given.items() if name.startswith(_PIXELS) or name in _FEATURES)
        return any(value is not None for value in (*encoded, *pixels))

    def encoded(self, *, video: bool) -> Any:
        """What the vision encoder gave: a tensor, a sequence of tensors (one for each image), or None."""
        output = (self.given.get(_ENCODED) or {}).get("video" if video else "image")
        return getattr(output, "pooler_output", None)

    def is_cut(self, *, video: bool) -> bool:
        """Whether features that were encoded before may be a part of what the vision encoder gave, which says more."""
        output = (self.given.get(_ENCODED) or {}).get("video" if video else "image")
        return getattr(output, "last_hidden_state", None) is None

    @property
    def pixel_sizes(self) -> list[tuple[int, int]] | None:
        """Height and width of each image in pixels, where they are told."""
        sizes = self.given.get(_SIZES)
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        return None if sizes is None else [(int(h), int(w)) for h, w in sizes]

    @property
    def uncut_images(self) -> list[bool] | None:
        """For each image, whether it is not cut into tiles because its row holds several; None where it is not told."""
        counts = self.given.get(_ROW_IMAGES)
        counts = counts.tolist() if isinstance(counts, Tensor) else counts
        return None if counts is None else [n != 1 for n in counts for _ in range(n)]

    def grids(self, *, video: bool) -> tuple[Tensor | None, bool]:
        """The grids of images or videos, `[n, 3]` (time, rows, columns) or `[n, 4]` (rows and columns of a coarse view,
        then of a fine one), and whether they count tokens (else patches, which the encoder merges)."""
        patches, tokens = _GRIDS[video]
        found = self.given.get(patches)
        return (self.given.get(tokens), True) if found is None else (found, False)

    def stacked(self, *, video: bool) -> tuple[int, ...] | None:
        """Leading axes of the pixels: images, or videos and their frames; None where they do not tell."""
        names = _VIDEO_PIXELS if video else _IMAGE_PIXELS
        pixels = next((found for name in names if (found := self.given.get(name)) is not None), None)
        return tuple(pixels.shape[:-3]) if isinstance(pixels, Tensor) and pixels.ndim >= 4 else None

    @property
    def has_only_videos(self) -> bool:
        """Whether videos come in and no image, so that placeholders of images hold frames."""

        def comes(names: tuple[str, ...], *, video: bool) -> bool:
            return self.encoded(video=video) is not None or any(self.given.get(name) is not None for name in names)

        return comes(_VIDEO_PIXELS, video=True) and not comes((*_IMAGE_PIXELS, *_FEATURES), video=False)

    def labels(self, row: int) -> list[int] | None:
        """A number for each token of a row, the same for the same token; None where neither ids nor embeddings tell."""
        if self.ids is not None:
            return [int(token) for token in self.ids[row].tolist()]
        if self.embeds is None:
            return None
        return [int(number) for number in torch.unique(self.embeds[row], dim=0, return_inverse=True)[1].tolist()]
