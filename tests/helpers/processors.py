"""Real processors of transformers around tiny images: what a caller of a tiny model of each family really hands to it.

A processor is a class of transformers, with its real image and video processor and a tokenizer of whole words, so that
nothing is downloaded. How many tokens each image has is asked of the processor itself, one image at a time.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import transformers
from families import IMAGE, PAD, tiny
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

VIDEO = 101
WORDS = range(5, 95)  # ids of the words w5 to w94

# What stands in a row: a word (str), an image (height, width) or a video (frames, height, width).
Part = str | tuple[int, int] | tuple[int, int, int]
Row = tuple[Part, ...]


def words(special: Mapping[str, int], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; `special` tokens need no space around them, `named` gives it attributes."""
    told = {"<pad>": PAD, "<s>": 1, "<unk>": 2, "</s>": 127, **special}
    taken = set(told.values())
    vocabulary = {f"w{number}": number for number in range(128) if number not in taken} | told
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in told])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=dict(named),
    )


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def clip(n_frames: int, height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (n_frames, height, width, 3), dtype=np.uint8)


def _built(name: str, **options: Any) -> Any:
    return getattr(transformers, name)(**options)


SQUARE = {"height": 32, "width": 32}
PATCHES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96], [128, 128]]
QWEN = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": 102, "<|vision_end|>": 103}


@dataclass(frozen=True)
class Kind:
    """How the processor of a family is built.

    Attributes:
        make: makes it.
        image: what stands for an image in the text; `video`: for a video.
        video: see `image`.
        model: changes of the tiny model's configuration.
        options: given to the processor in every call.
        frames: frames that the model sees of so many that it was given.
        together: tokens of an image that shares its row with others, where those have less.
    """

    make: Callable[[], Any]
    image: str = "<image>"
    video: str = "<video>"
    model: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    frames: Callable[[int], int] = lambda n: n
    together: int | None = None


BOTH = {"<image>": IMAGE, "<video>": VIDEO}


def _llava() -> Any:
    size = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
    return _built(
        "LlavaProcessor",
        image_processor=_built("CLIPImageProcessor", **size),
        tokenizer=words({"<image>": IMAGE}, {"image_token": "<image>"}),
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def _llava_next() -> Any:
    size = {"size": {"shortest_edge": 32}, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS}
    return _built(
        "LlavaNextProcessor",
        image_processor=_built("LlavaNextImageProcessor", **size),
        tokenizer=words({"<image>": IMAGE}, {"image_token": "<image>"}),
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def _llava_next_video() -> Any:
    size = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
    return _built(
        "LlavaNextVideoProcessor",
        video_processor=_built("LlavaNextVideoVideoProcessor", **size),
        image_processor=_built("LlavaNextImageProcessor", **size, image_grid_pinpoints=PINPOINTS),
        tokenizer=words(BOTH, {"image_token": "<image>", "video_token": "<video>"}),
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def _llava_onevision() -> Any:
    return _built(
        "LlavaOnevisionProcessor",
        image_processor=_built("LlavaOnevisionImageProcessor", size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer=words(BOTH, {"image_token": "<image>", "video_token": "<video>"}),
        video_processor=_built("LlavaOnevisionVideoProcessor", size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )


def _video_llava() -> Any:
    size = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
    return _built(
        "VideoLlavaProcessor",
        image_processor=_built("VideoLlavaImageProcessor", **size),
        video_processor=_built("VideoLlavaVideoProcessor", **size),
        tokenizer=words(BOTH, {"image_token": "<image>", "video_token": "<video>"}),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _qwen(prefix: str, video: str) -> Any:
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    return _built(
        f"{prefix}Processor",
        image_processor=_built("Qwen2VLImageProcessor", **PATCHES),
        tokenizer=words(QWEN, names),
        video_processor=_built(f"{video}VideoProcessor", **PATCHES, do_sample_frames=False),
    )


def _glm4v() -> Any:
    special = {"<|image|>": IMAGE, "<|video|>": VIDEO, "<|begin_of_video|>": 102, "<|end_of_video|>": 103}
    special |= {"<|begin_of_image|>": 104, "<|end_of_image|>": 105}
    return _built(
        "Glm4vProcessor",
        image_processor=_built("Glm4vImageProcessor", **PATCHES),
        tokenizer=words(special, {"image_token": "<|image|>", "video_token": "<|video|>"}),
        video_processor=_built("Glm4vVideoProcessor", **PATCHES, do_sample_frames=False),
    )


def _internvl() -> Any:
    special = {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": 102, "</img>": 103}
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return _built(
        "InternVLProcessor",
        image_processor=_built("GotOcr2ImageProcessor", size=SQUARE),
        tokenizer=words(special, names | {"video_token": "<video>"}),
        video_processor=_built("InternVLVideoProcessor", size=SQUARE),
        image_seq_length=4,
    )


def _aya_vision() -> Any:
    special = {"<image>": 104, "<|IMG_PATCH|>": IMAGE, "<|START_OF_IMG|>": 102, "<|END_OF_IMG|>": 103}
    special |= {"TILE_GLOBAL": 105} | {f"TILE_{tile}": 105 + tile for tile in range(1, 13)}
    return _built(
        "AyaVisionProcessor",
        image_processor=_built("GotOcr2ImageProcessor", size=SQUARE),
        tokenizer=words(special, {}),
        patch_size=8,
        img_size=32,
        downsample_factor=2,
    )


def _perception_lm() -> Any:
    return _built(
        "PerceptionLMProcessor",
        video_processor=_built("PerceptionLMVideoProcessor", size={"height": 28, "width": 28}),
        image_processor=_built("PerceptionLMImageProcessor", tile_size=28, max_num_tiles=4),
        tokenizer=words(BOTH, {"image_token": "<image>", "video_token": "<video>"}),
        patch_size=14,
        pooling_ratio=1,
    )


def _pixtral() -> Any:
    return _built(
        "PixtralProcessor",
        image_processor=_built("PixtralImageProcessor", size={"longest_edge": 64}, patch_size=8),
        tokenizer=words({"[IMG]": IMAGE, "[IMG_BREAK]": 102, "[IMG_END]": 103}, {"image_token": "[IMG]"}),
        patch_size=8,
        spatial_merge_size=2,
    )


def _ovis2() -> Any:
    special = {"<image>": 104, "<IMG_ATOM>": IMAGE, "<IMG_START>": 110, "<IMG_GRID>": 111}
    special |= {"<IMG_COL>": 112, "<IMG_ROW>": 113, "<IMG_END>": 114}
    return _built(
        "Ovis2Processor",
        image_processor=_built("Ovis2ImageProcessor", size=SQUARE, crop_to_patches=True),
        tokenizer=words(special, {}),
        image_seq_length=16,
    )


def _idefics(prefix: str, **more: Any) -> Any:
    special = {"<image>": IMAGE, "<video>": VIDEO, "<fake_token_around_image>": 102, "<global-img>": 103}
    special |= {"<end_of_utterance>": 104} | {
        f"<row_{r}_col_{c}>": 102 + 3 * r + c for r in (1, 2, 3) for c in (1, 2, 3)
    }
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    return _built(
        f"{prefix}Processor",
        image_processor=_built(f"{prefix}ImageProcessor", **sizes),
        tokenizer=words(special, {"image_token": "<image>"}),
        image_seq_len=4,
        **more,
    )


def _smolvlm() -> Any:
    from transformers.models.smolvlm import processing_smolvlm

    if processing_smolvlm.num2words is None:  # spells the number of frames out; not installed with transformers
        processing_smolvlm.num2words = str
    size = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}
    return _idefics("SmolVLM", video_processor=_built("SmolVLMVideoProcessor", **size))


def _gemma3() -> Any:
    special = {"<image_soft_token>": IMAGE, "<start_of_image>": 102, "<end_of_image>": 103}
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return _built(
        "Gemma3Processor",
        image_processor=_built("Gemma3ImageProcessor", size=SQUARE),
        tokenizer=words(special, names),
        image_seq_length=4,
    )


def _paligemma() -> Any:
    return _built(
        "PaliGemmaProcessor",
        image_processor=_built("SiglipImageProcessor", size=SQUARE, image_seq_length=16),
        tokenizer=words({"<image>": IMAGE}, {"image_token": "<image>"}),
    )


def _molmo2() -> Any:
    special = {"<im_patch>": IMAGE, "<|image|>": 102, "<|video|>": VIDEO, "<im_col>": 103, "<im_start>": 104}
    special |= {"<low_res_im_start>": 105, "<frame_start>": 106, "<im_end>": 107, "<frame_end>": 108, "<im_low>": 109}
    size = {"size": {"height": 32, "width": 32}, "patch_size": 8}
    return _built(
        "Molmo2Processor",
        image_processor=_built("Molmo2ImageProcessor", **size, overlap_margins=[1, 1], max_crops=4),
        video_processor=_built("Molmo2VideoProcessor", **size, pooling_size=[2, 2], do_sample_frames=False),
        tokenizer=words(special, {"image_token": "<|image|>", "video_token": "<|video|>"}),
    )


def half(n_frames: int) -> int:
    return -(-n_frames // 2)


SEEN, SEEN_VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
ANYRES = {"image_grid_pinpoints": PINPOINTS}
KINDS: dict[str, Kind] = {
    "llava": Kind(_llava),
    "vipllava": Kind(_llava),
    "llava_next": Kind(_llava_next, model=ANYRES),
    "llava_next_video": Kind(_llava_next_video, model=ANYRES),
    "llava_onevision": Kind(_llava_onevision, model=ANYRES, together=17),
    "video_llava": Kind(_video_llava),
    "qwen2_vl": Kind(lambda: _qwen("Qwen2VL", "Qwen2VL"), SEEN, SEEN_VIDEO, frames=half),
    "qwen2_5_vl": Kind(lambda: _qwen("Qwen2_5_VL", "Qwen2VL"), SEEN, SEEN_VIDEO, frames=half),
    "qwen3_vl": Kind(lambda: _qwen("Qwen3VL", "Qwen3VL"), SEEN, "<|video_pad|>", frames=half),
    "qwen3_5": Kind(lambda: _qwen("Qwen3VL", "Qwen3VL"), SEEN, "<|video_pad|>", frames=half),
    "glm4v": Kind(
        _glm4v,
        "<|begin_of_image|><|image|><|end_of_image|>",
        "<|begin_of_video|><|video|><|end_of_video|>",
        frames=half,
    ),
    "internvl": Kind(_internvl, "<IMG_CONTEXT>", options={"min_patches": 1, "max_patches": 4}),
    "aya_vision": Kind(_aya_vision, options={"min_patches": 1, "max_patches": 4}),
    "perception_lm": Kind(_perception_lm),
    "mistral3": Kind(_pixtral, "[IMG]"),
    "ovis2": Kind(_ovis2, options={"min_patches": 1, "max_patches": 4}),
    "idefics3": Kind(lambda: _idefics("Idefics3")),
    "smolvlm": Kind(_smolvlm),
    "gemma3": Kind(_gemma3, "<start_of_image>"),
    "paligemma": Kind(_paligemma),
    "molmo2": Kind(_molmo2, "<|image|>", "<|video|>", model={"vision_config": {"image_size": [32, 32]}}),
}


@cache
def processor(family: str) -> Any:
    """The processor of a family."""
    return KINDS[family].make()


def model_of(family: str, implementation: str = "sdpa") -> nn.Module:
    """A tiny random model that takes what the processor of its family returns."""
    return tiny(family, implementation, **KINDS[family].model)


def _text(kind: Kind, part: Part) -> str:
    return part if isinstance(part, str) else kind.image if len(part) == 2 else kind.video


def processed(family: str, rows: tuple[Row, ...], *, seed: int = 0, **options: Any) -> dict[str, Any]:
    """What the processor makes of `rows`, with different pixels in each image and video."""
    kind = KINDS[family]
    texts = [" ".join(_text(kind, part) for part in row) for row in rows]
    seeded = [[(part, seed + 100 * i + j) for j, part in enumerate(row)] for i, row in enumerate(rows)]
    images = [[picture(*part, number) for part, number in row if is_image(part)] for row in seeded]
    videos = [clip(*part, number) for row in seeded for part, number in row if is_video(part)]
    given: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt", **kind.options, **options}
    if any(images):
        given["images"] = images
    if videos:
        given["videos"] = videos
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about numpy
        return dict(processor(family)(**given))


def is_image(part: Part) -> bool:
    return not isinstance(part, str) and len(part) == 2


def is_video(part: Part) -> bool:
    return not isinstance(part, str) and len(part) == 3


@cache
def tokens_of(family: str, part: Part, *, alone: bool = True, **options: Any) -> tuple[int, ...]:
    """Visual tokens of an image, or of each frame of a video, as its processor places them when it stands alone."""
    if isinstance(part, str):
        return ()
    ids = processed(family, (("w5", part, "w6"),), **options)["input_ids"]
    total = int(((ids == IMAGE) | (ids == VIDEO)).sum())
    if len(part) == 2:
        together = KINDS[family].together
        return (total if alone or together is None else together,)
    n_frames = KINDS[family].frames(part[0])
    return (total // n_frames,) * (n_frames - 1) + (total - total // n_frames * (n_frames - 1),)


def expected(family: str, rows: tuple[Row, ...], **options: Any) -> tuple[tuple[int, ...], ...]:
    """Visual tokens of each image and frame of each row."""

    def counts(row: Row) -> Iterator[int]:
        alone = sum(map(is_image, row)) == 1
        return (count for part in row for count in tokens_of(family, part, alone=alone, **options))

    return tuple(tuple(counts(row)) for row in rows)
