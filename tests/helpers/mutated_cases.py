"""What ``mutated.py`` runs on a mutated transformers: small models, dense and patched, their logits and traces.

This is a user's script and stands alone: it is rewritten by the same renaming as transformers is, so every upstream
name in it is the name of the transformers at hand. It takes the path of the result; the judge sits in ``mutated.py``.
"""

import copy
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import tokenprune

IMAGE, PAD, DIM, STEPS = 100, 0, 32, 3
CONFIGS: dict[str, Any] = json.loads((Path(__file__).parent / "tiny_configs.json").read_text())["families"]
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
RAGGED = ((3, (3, 4), 4, (2, 2), 3), (5, (3, 4), 2), (6, (2, 2), 1, (2, 2), 5))  # Lengths of text, sizes of images.
PIXELS = tuple((before, {"llava": (4, 4), "gemma3": (2, 2)}, after) for before, after in ((3, 4), (6, 2), (2, 3)))
FALLING, ENDS = (1.0, 1.0, 0.5, 0.3), {"keep_first": 1, "keep_recent": 2}  # All layers of DeepStack see everything.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "divprune": ("divprune", {"keep": 0.5}),
    "aim": ("aim", {"merge": 0.5, "prune": (1, 3)}),
    "fastv": ("fastv", {"layer": 2, "keep": 0.5}),
    "spatten": ("spatten", {"tokens": FALLING}),
    "spatten-heads": ("spatten", {"tokens": FALLING, "heads": 0.7, "values": 0.5}),
    "spatten-text": ("spatten", {"tokens": FALLING, "heads": 0.7, "protect_text": False, "interval": 2, **ENDS}),
    "spatten-4+4": ("spatten", {"tokens": 1.0, "quantize": "4+4"}),
    "tome": ("tome", {"r": 2}),
    "encoder-tome": ("tome", {"r": 2}),
    "encoder-spatten": ("spatten", {"tokens": 0.5, "heads": 0.7}),
}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(model: nn.Module) -> nn.Module:
    """The model with weights large enough for errors to show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                std = 1.0 if "embed" in name else 0.25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


@lru_cache
def built(family: str, implementation: str) -> nn.Module:
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(CONFIGS[family]))
    torch.manual_seed(0)
    cls = transformers.AutoModelForImageTextToText
    model = drawn(cls.from_config(config, attn_implementation=implementation))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


@lru_cache
def built_encoder(name: str, implementation: str) -> nn.Module:
    cls = getattr(transformers, name)
    fields = {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 40,
        "patch_size": 8, "image_size": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    return drawn(cls._from_config(cls.config_class(**fields), attn_implementation=implementation))


# --- inputs ----------------------------------------------------------------------------------------


def ids_and_mask(rows: Any) -> dict[str, Tensor]:
    """Left-padded ids of rows of text lengths and image sizes."""
    ids = []
    for seed, row in enumerate(rows):
        generator = torch.Generator().manual_seed(1000 + seed)
        parts = [
            torch.randint(5, 95, (part,), generator=generator)
            if isinstance(part, int)
            else torch.full((part[0] * part[1],), IMAGE)
            for part in row
        ]
        ids.append(torch.cat(parts))
    length = max(map(len, ids))
    padded = torch.stack([torch.cat([torch.full((length - len(row),), PAD), row]) for row in ids])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in ids]).long()
    return {"input_ids": padded, "attention_mask": mask}


def prompt(family: str, rows: Any) -> dict[str, Any]:
    """What a family takes beside the images."""
    given: dict[str, Any] = ids_and_mask(rows)
    visual = (given["input_ids"] == IMAGE).long()
    if family.startswith("qwen"):
        grids = [part for row in rows for part in row if isinstance(part, tuple)]
        given["image_grid_thw"] = torch.tensor([(1, 2 * h, 2 * w) for h, w in grids])
        given["mm_token_type_ids"] = visual
    if family == "gemma3":
        given["token_type_ids"] = visual
    return given


def with_features(model: Any, family: str) -> dict[str, Any]:
    """Encoded images of several sizes; pixels where a model takes no encoded ones (transformers 5.17)."""
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return with_pixels(family)
    sizes = [(seed, part) for seed, row in enumerate(RAGGED) for part in row if isinstance(part, tuple)]
    images = [randn(7 * seed + i, h * w, DIM) for i, (seed, (h, w)) in enumerate(sizes)]
    output: Any = BaseModelOutputWithPooling(
        pooler_output=torch.cat(images)[None] if family == "gemma3" else images,
    )
    if family == "qwen3_vl":
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        planes = [[image.roll(layer + 1, -1) * 0.5 for image in images] for layer in range(2)]
        output = BaseModelOutputWithDeepstackFeatures(pooler_output=images, deepstack_features=planes)
    return {**prompt(family, RAGGED), "mm_encoder_outputs": {"image": output}}


def with_pixels(family: str) -> dict[str, Any]:
    """One image a row, as pixels."""
    rows = [(before, sizes.get(family, (2, 3)), after) for before, sizes, after in PIXELS]
    if family.startswith("qwen"):
        pixels = torch.cat([randn(100 + row, 24, 96) for row in range(3)])
    else:
        pixels = torch.stack([randn(100 + row, 3, 32, 32) for row in range(3)])
    return {**prompt(family, rows), "pixel_values": pixels}


# --- runs: what a model answers to a feed, as a list of tensors -------------------------------------

Answer = list[Tensor]


def generate(model: Any, given: dict[str, Any], **options: Any) -> Answer:
    """Ids and logits of a few greedy tokens."""
    out = model.generate(
        **copy.deepcopy(given), max_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, suppress_tokens=list(range(IMAGE, IMAGE + 15)), **options,
    )  # fmt: skip
    return [out.sequences, *out.logits]


def loop(model: Any, given: dict[str, Any]) -> Answer:
    """Logits of a prompt and of tokens fed one by one, with the state of the call before."""
    given = copy.deepcopy(given)
    mask = given["attention_mask"]
    if "mm_token_type_ids" not in given:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(**given, use_cache=True)
    answers, shift = [out.logits[:, -1]], out.get("rope_deltas")
    for _ in range(STEPS - 1):
        state = next(word for word in ("past_key_values", "cache") if out.get(word) is not None)
        mask = torch.cat([mask, mask[:, -1:]], 1)
        ids = out.logits[:, -1:, 5:95].argmax(-1) + 5
        place = mask.sum(-1, keepdim=True) - 1
        if shift is not None:
            place = (place + shift).expand(3, -1, -1)
        fed = {"input_ids": ids, "attention_mask": mask, "position_ids": place, state: out[state], "use_cache": True}
        if "token_type_ids" in given:
            fed["token_type_ids"] = torch.zeros_like(ids)
        out = model(**fed)
        answers.append(out.logits[:, -1])
    return answers


def encode(model: Any, given: dict[str, Any]) -> Answer:
    """What a vision encoder returns."""
    out = model(**given)
    return [out.last_hidden_state, *([] if out.pooler_output is None else [out.pooler_output])]


FEEDS: dict[str, Callable[[nn.Module, str], Answer]] = {
    "features": lambda model, family: generate(model, with_features(model, family)),
    "pixels": lambda model, family: generate(model, with_pixels(family)),
    "static": lambda model, family: generate(model, with_features(model, family), cache_implementation="static"),
    "beams": lambda model, family: generate(model, with_features(model, family), num_beams=2),
    "loop": lambda model, family: loop(model, with_features(model, family)),
    "encoder": lambda model, family: encode(model, {"pixel_values": randn(5, 3, 3, 32, 32)}),
}


def cases() -> list[tuple[str, str, str, str]]:
    """(model, attention implementation, method, feed)."""
    found = []
    for family in FAMILIES:
        text = "spatten-heads" if family == "gemma3" else "spatten-text"  # Sliding layers keep all their entries.
        found += [(family, "sdpa", method, "features") for method in ("divprune", "aim", "spatten", "spatten-heads")]
        found += [(family, "sdpa", method, "pixels") for method in ("divprune", "aim", "fastv")]
        found += [(family, "sdpa", method, "loop") for method in ("divprune", "aim", text)]
        found += [(family, "eager", method, "features") for method in ("divprune", "aim", text)]
    found += [("llava", "sdpa", method, feed) for feed in ("static", "beams") for method in ("divprune", "aim")]
    found += [("llava", "sdpa", method, "features") for method in ("spatten-4+4", "spatten-text")]
    found += [("llava", implementation, "tome", "pixels") for implementation in ("sdpa", "eager")]
    for name in ("CLIPVisionModel", "Dinov2Model", "SiglipVisionModel"):
        found += [(name, "sdpa", method, "encoder") for method in ("encoder-tome", "encoder-spatten")]
        found += [(name, "eager", "encoder-tome", "encoder")]
    return found


def failure(error: BaseException) -> str:
    """Kind, first line of the message, and the last frame: within tokenprune, where there is one."""
    home = str(Path(tokenprune.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((one for one in reversed(frames) if one.filename.startswith(home)), frames[-1])
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} [{Path(frame.filename).name}:{frame.lineno} {frame.name}]"


@torch.no_grad()
def run(name: str, implementation: str, method: str, feed: str, dense: dict[Any, Any]) -> dict[str, Any]:
    """One case: `dense` and `pruned` as answers, or as the text of an error."""
    key = (name, implementation, feed)
    build = built_encoder if feed == "encoder" else built
    if key not in dense:
        try:
            dense[key] = FEEDS[feed](copy.deepcopy(build(name, implementation)), name)
        except Exception as error:
            dense[key] = failure(error)
    result: dict[str, Any] = {"dense": dense[key], "refused": False, "traces": []}
    if isinstance(dense[key], str):
        return result
    model = copy.deepcopy(build(name, implementation))
    known, options = METHODS[method]
    try:
        session = tokenprune.patch(model, known, **options)
        result["pruned"] = FEEDS[feed](model, name)
        result["traces"] = [
            (one.site, one.layer, one.n_in, one.n_out, one.status, one.reason) for one in session.traces
        ]
    except Exception as error:
        result["pruned"], result["refused"] = failure(error), isinstance(error, tokenprune.TokenPruneError)
    return result


def main(path: str) -> None:
    torch.set_num_threads(1)
    dense: dict[Any, Any] = {}
    torch.save({" ".join(case): run(*case, dense) for case in cases()}, path)


if __name__ == "__main__":
    main(sys.argv[1])
