"""The families of models, one declarative row each, and the families that are refused, with the reason.

A family is recognised by the names of the classes a model descends from, so nothing is imported to find out. To add a
family whose text decoder stands apart (``model.get_decoder()``) and whose images enter it as placeholder tokens, add a
row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenprune.upstream.check import look_up


def _pooled_frame(config: Any) -> int:
    """Tokens of a frame whose side is image_size / patch_size, pooled by two or as the config says, and rounded up."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    return int(math.ceil(side / getattr(config, "spatial_pool_stride", 2)) ** 2)


@dataclass(frozen=True)
class Family:
    """How the visual tokens of a family are found and told apart.

    Attributes:
        name: as transformers' `model_type` has it.
        prefix: the family's classes descend from `<prefix>PreTrainedModel`.
        ids: fields of the config that hold placeholder ids.
        rows_are_images: encoder output stacked as `[n, N, D]` has a row for each image (else for each tile of one).
        joins: an image's placeholders may be broken into lines by other tokens.
        tiles: how the tiles of an image, which other tokens stand between, differ from images: one of :data:`TILES`;
            "": its tiles follow each other without anything between.
        tiles_stacked: pixels stacked as `[n, tiles, ...]` have a row for each image.
        apart: its processor always puts something between two images.
        frame_tokens: tokens of a video frame, where the frames of a video follow each other without text between.
        square: tokens of an image that make a square grid, as a function of the config; None: any square number does;
            0: never.
        mrope: positions have several axes, so they cannot be renumbered.
        video: takes videos.
        note: what a user should know.
    """

    name: str
    prefix: str
    ids: tuple[str, ...] = ("image_token_id",)
    rows_are_images: bool = False
    joins: bool = False
    tiles: str = ""
    tiles_stacked: bool = False
    apart: bool = False
    frame_tokens: Callable[[Any], int] | None = None
    square: Callable[[Any], int] | int | None = None
    mrope: bool = False
    video: bool = False
    note: str = ""


TILES = ("tagged", "closed", "opened", "lined")
"""What tells tiles from images: the tag of the last tile is the same in all images; the token behind that tile is; a
token opens each image; or nothing is known, and what looks like the lines of one image is taken for one."""

_BOTH = ("image_token_id", "video_token_id")
_BROKEN = ("pixtral", "molmo2_vision")
_BLOCKS = "image tokens see each other in both directions"


def _internvl_tile(config: Any) -> int:
    vision = config.vision_config
    sides: list[int] = [
        int(size // patch * config.downsample_ratio)
        for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
    ]
    return sides[0] * sides[1] if sides[0] == sides[1] else 0


FAMILIES: tuple[Family, ...] = (
    Family("llava", "Llava", rows_are_images=True, joins=True),
    Family("vipllava", "VipLlava", rows_are_images=True),
    Family("llava_next", "LlavaNext", square=0, note="tiles and newline tokens count as part of their image"),
    Family(
        "llava_next_video",
        "LlavaNextVideo",
        _BOTH,
        frame_tokens=_pooled_frame,
        square=0,
        video=True,
    ),
    Family("llava_onevision", "LlavaOnevision", _BOTH, frame_tokens=_pooled_frame, square=0, video=True),
    Family("video_llava", "VideoLlava", _BOTH, rows_are_images=True, video=True),
    Family("qwen2_vl", "Qwen2VL", _BOTH, mrope=True, apart=True, video=True),
    Family("qwen2_5_vl", "Qwen2_5_VL", _BOTH, mrope=True, apart=True, video=True),
    Family(
        "qwen3_vl", "Qwen3VL", _BOTH, mrope=True, apart=True, video=True, note="DeepStack features are shortened along"
    ),
    Family(
        "qwen3_5",
        "Qwen3_5",
        _BOTH,
        mrope=True,
        apart=True,
        video=True,
        note="layers of linear attention rank no tokens: the attention layer before them does",
    ),
    Family(
        "glm4v",
        "Glm4v",
        _BOTH,
        mrope=True,
        apart=True,
        video=True,
        note="two images a row with beams are wrong in transformers itself",
    ),
    Family("internvl", "InternVL", square=_internvl_tile, apart=True, video=True),
    Family("aya_vision", "AyaVision", tiles="closed", apart=True),
    Family("perception_lm", "PerceptionLM", _BOTH, tiles_stacked=True, square=0, video=True),
    Family("mistral3", "Mistral3", joins=True, apart=True),
    Family("ovis2", "Ovis2", tiles="opened", apart=True, square=0, note="visual indicator tokens are never pruned"),
    Family("idefics3", "Idefics3", tiles="tagged", apart=True),
    Family("smolvlm", "SmolVLM", tiles="tagged", apart=True, video=True),
    Family(
        "gemma3", "Gemma3", rows_are_images=True, apart=True, note=f"{_BLOCKS}; each crop of pan and scan is an image"
    ),
    Family("paligemma", "PaliGemma", rows_are_images=True, note=_BLOCKS),
    Family("molmo2", "Molmo2", ("image_patch_id",), joins=True, square=0, video=True, note=_BLOCKS),
)

REFUSED: dict[str, str] = {
    "Mllama": "its images enter by cross-attention, so the decoder's sequence has no visual tokens to prune",
    "Florence2": "it is an encoder-decoder whose visual tokens live in the encoder",
    "InstructBlip": "its Q-Former has reduced the image to a few query tokens already",
    "InstructBlipVideo": "its Q-Former has reduced the video to a few query tokens already",
    "Blip2": "its Q-Former has reduced the image to a few query tokens already",
    "Blip": "it is an encoder-decoder whose images enter by cross-attention",
    "Kosmos2": "its resampler has reduced the image to a few query tokens already",
    "Llama4": "its chunked attention counts positions that pruning would shift",
    "Emu3": "its images are vocabulary ids that the decoder cannot tell from text",
    "Chameleon": "its images are vocabulary ids that the decoder cannot tell from text",
    "Janus": "it generates images with the same decoder",
    "Gemma3n": "its decoder takes per-layer inputs for every token",
    "Gemma4": "its decoder takes per-layer inputs for every token",
    "Granite4Vision": "its decoder takes further tensors for every token",
    "Ernie4_5_VLMoe": "its decoder routes by further tensors for every token",
}


UNNAMED = (
    "to prune image features that you merge into its embeddings (tokenprune.visual_tokens), name a placeholder that "
    "its text never holds: model.config.image_token_id = ID"
)
"""What a model of text needs to be taken for one with images."""
_PLACEHOLDERS = tuple(dict.fromkeys(field for family in FAMILIES for field in family.ids))


def placeholder_id(root: nn.Module, field: str) -> int | None:
    """The id of a placeholder token, None where the model has none of this kind.

    Raises:
        UnsupportedModelError: the config does not know the field.
    """
    token_id = look_up(root, f"config.{field}", role="placeholder token")
    return None if token_id is None else int(token_id)


def takes_images(model: nn.Module) -> bool:
    """Whether there are placeholder tokens for images in the text of `model` or of what it wraps."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(isinstance(getattr(config, field, None), int) for config in configs for field in _PLACEHOLDERS)


def untabled(root: nn.Module, model: nn.Module) -> Family | None:
    """A row with defaults for a family that has none; None where its visual tokens cannot be found. Without names of
    placeholders: a model of text."""
    config: Any = root.config
    fields = tuple(field for field in _BOTH if isinstance(getattr(config, field, None), int))
    if not fields and is_text(root) and hasattr(model, "generate"):
        return Family(str(getattr(config, "model_type", type(model).__name__)), "", ids=())
    name = type(model).__name__
    if not fields:
        return None
    lines = getattr(getattr(config, "vision_config", None), "model_type", None) in _BROKEN
    return Family(min(ancestors(model), default=name).lower(), name, fields, joins=lines, tiles="lined", square=0)


def is_text(root: nn.Module) -> bool:
    """Whether a model has no vision encoder of its own."""
    return getattr(getattr(root, "config", None), "vision_config", None) is None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has a text encoder beside its decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def breaks_lines(root: nn.Module, family: Family) -> bool:
    """Whether an image's tokens are broken into lines by others, which the vision encoder of `root` decides."""
    if not family.joins:
        return False
    return look_up(root, "config.vision_config.model_type", role="type of the vision encoder") in _BROKEN


def n_planes(root: nn.Module) -> int:
    """Decoder layers whose visual tokens get features of the vision encoder added (DeepStack)."""
    vision = getattr(getattr(root, "config", None), "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def axes_of(positions: Tensor | None) -> Tensor | None:
    """Time, row and column of every token `[3, B, L]` on the CPU, where positions tell them (M-RoPE)."""
    return None if positions is None or positions.ndim != 3 else positions[-3:].cpu()


def ancestors(model: object) -> set[str]:
    """Prefixes of the `<prefix>PreTrainedModel` classes that `model` descends from."""
    names = (cls.__name__ for cls in type(model).__mro__)
    return {name.removesuffix("PreTrainedModel") for name in names if name.endswith("PreTrainedModel")} - {""}


def family_of(model: object) -> Family | None:
    """The row of the family that `model` belongs to, None where there is none."""
    found = ancestors(model)
    return next((family for family in FAMILIES if family.prefix in found), None)


def refusal(model: object) -> tuple[str, str] | None:
    """Prefix and reason where `model` is of a family that is known and refused."""
    return next(((prefix, REFUSED[prefix]) for prefix in sorted(ancestors(model)) if prefix in REFUSED), None)
