"""Ask a model, as it is at the moment, about a batch of samples.

Two ways. *Forced*: the prompt goes in, pruned or not, and then the expected answer on top of the cache, which decides
for all of its words at once whether greedy decoding would have produced exactly it, end of sequence included. Only the
prompt is there when tokens are selected, as in use. *Generated*: `generate`, and a score of what was said
(`scoring.py`), for models that answer in their own words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from data import Sample
from names import upstream
from scoring import SCORES
from torch import Tensor

from tokenprune.errors import InputError
from tokenprune.report.loading import Loaded, decode, interpolating, one_line, resized_inputs

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Setting:
    """How answers are taken.

    Attributes:
        forced: compare greedy decoding with the expected words, see above; else generate.
        score: a name of `scoring.SCORES`, for generated answers.
        max_new_tokens: of a generated answer.
        prompt: text of a prompt with `{question}` in it; None: the processor's chat template.
    """

    forced: bool = True
    score: str = "exact"
    max_new_tokens: int = 16
    prompt: str | None = None


@dataclass
class Asked:
    """A batch ready to be asked again and again.

    Attributes:
        samples: the samples, all questions about an image together.
        inputs: prompts and pixels on the model's device, padded on the left.
        expected: words of the answers, `[B, A]`, -100 where a row has fewer; None for generated answers.
        encoded: inputs with visual features in place of pixels, by the side of a resized image.
    """

    samples: Sequence[Sample]
    inputs: dict[str, Any]
    expected: Tensor | None
    encoded: dict[int | None, dict[str, Any]] = field(default_factory=dict)


def prompt_of(processor: Any, question: str, setting: Setting) -> str:
    """The text of a prompt."""
    if setting.prompt is not None:
        return setting.prompt.replace("{question}", question)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    return f"{getattr(processor, 'image_token', None) or '<image>'}\n{question}"


def prepare(loaded: Loaded, samples: Sequence[Sample], setting: Setting) -> Asked:
    """Tokenise and process a batch.

    Raises:
        InputError: the processor refuses it.
    """
    processor, weight = loaded.processor, next(loaded.model.parameters())
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    text = [prompt_of(processor, sample.question, setting) for sample in samples]
    images: list[Any] = [sample.image for sample in samples]
    try:
        try:
            inputs = processor(images=images, text=text, return_tensors="pt", padding=True)
        except (ValueError, TypeError):  # some want a list of images for each prompt
            inputs = processor(images=[[image] for image in images], text=text, return_tensors="pt", padding=True)
    except Exception as error:
        raise InputError(f"the processor of {loaded.name} refuses these samples: {one_line(error)}") from error
    expected = None
    if setting.forced:
        end = tokenizer.eos_token or ""
        words = [tokenizer(f"{sample.answer} {end}", add_special_tokens=False)["input_ids"] for sample in samples]
        expected = torch.full((len(samples), max(map(len, words))), -100)
        for row, ids in enumerate(words):
            expected[row, : len(ids)] = torch.tensor(ids)
    return Asked(samples, dict(inputs.to(weight.device, dtype=weight.dtype)), expected)


def grid_side(model: Any) -> int | None:
    """Patches on a side of the image, for models that take one square image and can interpolate (LLaVA); else None."""
    vision = getattr(model.config, "vision_config", None)
    if model.config.model_type != "llava" or not hasattr(vision, "image_size"):
        return None
    return int(vision.image_size) // int(vision.patch_size)


@torch.inference_mode()
def ask(loaded: Loaded, asked: Asked, setting: Setting, *, share: bool, side: int | None = None) -> list[float]:
    """How right each answer is, from 0 to 1, with the model as it is.

    Args:
        loaded: the model, patched or not.
        asked: what to ask it.
        setting: how.
        share: encode each image once for all questions about it and all methods (LLaVA only); to be left out where a
            method prunes inside the vision encoder.
        side: make images smaller first, to `side` x `side` patches (LLaVA only).
    """
    inputs = asked.inputs
    if grid_side(loaded.model) is not None and (share or side is not None):
        if side not in asked.encoded:
            asked.encoded[side] = _encode(loaded.model, inputs, side)
        inputs = asked.encoded[side]
    if asked.expected is not None:
        return _forced(loaded.model, inputs, asked.expected)
    return _generated(loaded, inputs, asked.samples, setting)


@torch.inference_mode()
def ask_smaller(loaded: Loaded, asked: Asked, setting: Setting, *, keep: float) -> list[float]:
    """The baseline `resize` for any model, one sample at a time: the image is made smaller before the processor.

    Raises:
        OptionError: the model's processor makes as many tokens of images of every size.
    """
    scores = []
    for sample in asked.samples:
        inputs = resized_inputs(loaded, sample.image, sample.question, keep=keep)
        with interpolating(loaded.model):
            scores += _generated(loaded, inputs, [sample], setting)
    return scores


def _forced(model: Any, inputs: dict[str, Any], expected: Tensor) -> list[float]:
    device = inputs["input_ids"].device
    expected = expected.to(device)
    first = model(**_fresh(inputs), use_cache=True, logits_to_keep=1)
    logits = first.logits[:, -1:]
    if expected.shape[1] > 1:
        words = expected[:, :-1].clamp(min=0)
        mask = inputs["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(words.shape)], dim=1)
        rest = model(
            input_ids=words, attention_mask=mask, **upstream.with_cache(upstream.cache_of(first)), use_cache=True
        )
        logits = torch.cat([logits, rest.logits], dim=1)
    right = ((logits.argmax(-1) == expected) | (expected == -100)).all(dim=1)
    return [float(one) for one in right]


def _generated(loaded: Loaded, inputs: dict[str, Any], samples: Sequence[Sample], setting: Setting) -> list[float]:
    ids = loaded.model.generate(**_fresh(inputs), max_new_tokens=setting.max_new_tokens, **GREEDY)
    said = [decode(loaded, row[inputs["input_ids"].shape[1] :]) for row in ids]
    return [SCORES[setting.score](words, sample) for words, sample in zip(said, samples, strict=True)]


def _fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs whose dictionaries may be written to."""
    return {name: dict(value) if type(value) is dict else value for name, value in inputs.items()}


def _encode(model: Any, inputs: dict[str, Any], side: int | None) -> dict[str, Any]:
    """Inputs whose pixels are replaced by visual features, computed once per image although many questions share it.

    With `side`, images are first made smaller, to `side` x `side` patches, and superfluous image tokens are taken out.
    """
    pixels, image_of = inputs["pixel_values"].unique_consecutive(dim=0, return_inverse=True)
    config, options = model.config, {}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if side is not None:
        size = (side * config.vision_config.patch_size,) * 2
        pixels = torch.nn.functional.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True)
        pixels = pixels.to(inputs["pixel_values"].dtype)
        options["interpolate_pos_encoding"] = True
        image = ids == config.image_token_id
        stays = ~(image & (image.cumsum(1) > side * side))
        ids, mask = ids[stays].view(len(ids), -1), mask[stays].view(len(ids), -1)
    features = model.model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        return_dict=True,
        **options,
    )
    pooled = upstream.pooled_of(features)
    output = upstream.encoder_output([pooled[i] for i in image_of.tolist()])
    return {"input_ids": ids, "attention_mask": mask, **upstream.with_features(output)}
