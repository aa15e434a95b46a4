"""Tiny random models of every family and ragged batches for them, built from ``tiny_configs.json``."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText
from upstream import FEATURES, encoder_output, with_features

CONFIGS: dict[str, Any] = json.loads((Path(__file__).parent / "tiny_configs.json").read_text())["families"]
FAMILIES = tuple(CONFIGS)
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
STACKED = (
    "aya_vision",
    "gemma3",
    "internvl",
    "ovis2",
    "paligemma",
    "paligemma2",
    "perception_lm",
    "video_llava",
    "vipllava",
)
IMAGE, PAD, DIM, CLOSING = 100, 0, 32, 99

# A row is a sequence of text lengths (int) and images (h, w), as they stand in the prompt.
Row = tuple[int | tuple[int, int], ...]
RAGGED: tuple[Row, ...] = ((3, (3, 4), 4, (2, 2), 3), (5, (3, 4), 2), (6, (2, 2), 1, (2, 2), 5))
EVEN: tuple[Row, ...] = ((3, (3, 4), 4), (2, (3, 4), 5))


def implementations(family: str) -> tuple[str, ...]:
    return ("eager",) if family == "paligemma2" else ("sdpa", "eager")


@cache
def _model(family: str, implementation: str, overrides: str) -> nn.Module:
    raw = copy.deepcopy(CONFIGS[family])
    for part, fields in json.loads(overrides).items():
        raw[part] = {**raw[part], **fields} if isinstance(fields, dict) else fields
    config = AutoConfig.for_model("paligemma" if family == "paligemma2" else family, **raw)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                std = 1.0 if "embed" in name else 0.25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def tiny(family: str, implementation: str = "sdpa", **overrides: Any) -> nn.Module:
    """A tiny random model, a fresh copy for each call. `text_config={...}` and the like override the configuration."""
    return copy.deepcopy(_model(family, implementation, json.dumps(overrides)))


@cache
def _dense(family: str, implementation: str, overrides: str) -> nn.Module:
    return copy.deepcopy(_model(family, implementation, overrides))


def twins(family: str, implementation: str = "sdpa", **overrides: Any) -> tuple[nn.Module, nn.Module]:
    """A tiny model that all tests share, so that none may change it, and a copy of it to be patched."""
    return _dense(family, implementation, json.dumps(overrides)), tiny(family, implementation, **overrides)


@dataclass(frozen=True)
class Batch:
    """Inputs of a batch and where its rows' tokens stand."""

    inputs: dict[str, Any]
    pads: tuple[int, ...]
    rows: tuple[Row, ...]


def features_of(row: Row, *, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(h * w, DIM, generator=generator) for h, w in (part for part in row if isinstance(part, tuple))]


def _row_ids(family: str, row: Row, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    parts = []
    for part in row:
        if isinstance(part, int):
            parts.append(torch.randint(5, 95, (part,), generator=generator))
        else:
            parts.append(torch.full((part[0] * part[1],), IMAGE))
    ids = torch.cat(parts)
    if family == "aya_vision":  # whose processor closes every image with a token of its own
        ids[1:][(ids[:-1] == IMAGE) & (ids[1:] != IMAGE)] = CLOSING
    return ids


def _encoded(family: str, images: list[Tensor], seeds: list[int]) -> Any:
    if family in STACKED:
        same = len({len(image) for image in images}) == 1
        pooled: Any = torch.stack(images) if same else torch.cat(images)[None]
    else:
        pooled = images
    if family == "qwen3_vl":
        return encoder_output(
            pooled, planes=[[image.roll(layer + 1, -1) * 0.5 for image in images] for layer in range(2)]
        )
    if family == "ovis2":
        return encoder_output(pooled, indicators=torch.randn(5, DIM, generator=torch.Generator().manual_seed(3)))
    return encoder_output(pooled)


def batch(
    family: str, rows: tuple[Row, ...] = RAGGED, *, seeds: tuple[int, ...] | None = None, extra: Tensor | None = None
) -> Batch:
    """Left-padded inputs with image features in place of pixels.

    Args:
        family: which family.
        rows: what stands in each row.
        seeds: a seed for the content of each row, so that a row alone is the row of a batch.
        extra: `[B, n]` ids that follow the prompt (tokens generated so far).
    """
    seeds = tuple(range(len(rows))) if seeds is None else seeds
    ids = [_row_ids(family, row, seed) for row, seed in zip(rows, seeds, strict=True)]
    length = max(map(len, ids))
    pads = tuple(length - len(row) for row in ids)
    input_ids = torch.stack([torch.cat([torch.full((pad,), PAD), row]) for pad, row in zip(pads, ids, strict=True)])
    mask = torch.stack([torch.arange(length) >= pad for pad in pads]).long()
    if extra is not None:
        input_ids, mask = torch.cat([input_ids, extra], 1), torch.cat([mask, torch.ones_like(extra)], 1)
    images = [image for row, seed in zip(rows, seeds, strict=True) for image in features_of(row, seed=seed)]
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
    if images:
        inputs |= with_features(_encoded(family, images, list(seeds)))
    visual = (input_ids == IMAGE).long()
    if family in MROPE and images:
        grids = [part for row in rows for part in row if isinstance(part, tuple)]
        inputs["image_grid_thw"] = torch.tensor([(1, 2 * h, 2 * w) for h, w in grids])
    if family in (*MROPE, "molmo2"):
        inputs["mm_token_type_ids"] = visual
    if family == "gemma3":
        inputs["token_type_ids"] = visual
    if family in ("paligemma", "paligemma2"):
        inputs["token_type_ids"] = torch.zeros_like(
            visual
        )  # the prompt sees itself in both directions, what follows does not
        if extra is not None:
            inputs["token_type_ids"][:, length:] = 1
    return Batch(inputs, pads, rows)


def alone(family: str, rows: tuple[Row, ...], row: int) -> Callable[[Tensor], Batch]:
    """Gives one of the `rows` of a batch by itself, with ids `[1, n]` behind it."""
    return lambda extra: batch(family, (rows[row],), seeds=(row,), extra=extra)


def fresh(inputs: dict[str, Any], *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """A copy for one call: transformers writes into the features given beforehand. `dtype` converts them."""
    copied = copy.deepcopy(inputs)
    if dtype is not None:
        for output in copied.get(FEATURES, {}).values():
            for key, value in output.items():
                output[key] = _cast(value, dtype)
    return copied


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else [_cast(part, dtype) for part in value]


def generate(model: nn.Module, inputs: dict[str, Any], n: int, **kwargs: Any) -> Any:
    """`n` greedy tokens with their logits. Placeholder ids are not generated: a reference could not tell them from an
    image."""
    options = {
        "max_new_tokens": n,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "suppress_tokens": list(range(IMAGE, IMAGE + 15)),
        **kwargs,
    }
    with torch.no_grad():
        return model.generate(**fresh(inputs), **options)
