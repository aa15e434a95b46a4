"""Models, processors and tokenizers of transformers: loaded, asked, and read."""

import inspect
import logging
from collections.abc import Mapping
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch import nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.upstream.check import look_up, missing, need
from tokenprune.upstream.generating import PROMPTS, end_ids, prompt_of

if TYPE_CHECKING:
    from PIL import Image

_PLACEHOLDERS = ("image_token_id", "image_patch_id", "image_token_index")
_INTERPOLATE = "interpolate_pos_encoding"


def load_pretrained(name: str, *, dtype: str, device: str) -> tuple[Any, Any]:
    """A model that turns images and text into text, and its processor.

    Args:
        name: a folder or a name on the hub; remote code is never run.
        dtype: `"auto"` is what the checkpoint says.
        device: where the model goes.

    Raises:
        UnsupportedModelError: it is of another kind. Loaders raise errors of many other kinds beside.
    """
    config = _auto("AutoConfig").from_pretrained(name, trust_remote_code=False)
    if type(config) not in _auto("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"):
        kind = getattr(config, "model_type", type(config).__name__)
        raise UnsupportedModelError(f"{name} is a {kind} model, which does not turn images and text into text")
    processor = _auto("AutoProcessor").from_pretrained(name, trust_remote_code=False)
    if not hasattr(processor, "image_processor"):
        raise UnsupportedModelError(f"{name} has no processor for images ({type(processor).__name__})")
    model = _auto("AutoModelForImageTextToText").from_pretrained(name, dtype=dtype)
    return model.eval().to(device), processor


def _auto(kind: str) -> Any:
    return need("transformers", kind, role="loader")


def image_mark(processor: Any) -> str:
    """What represents the image in a prompt."""
    return getattr(processor, "image_token", None) or "<image>"


def process(processor: Any, image: "Image.Image", question: str, **processing: Any) -> Any:
    """What a processor makes of one image and one question, with its chat template where it has one.

    Args:
        processor: the model's.
        image: what the question is about.
        question: in plain words.
        **processing: further options of the image processor, such as `size`.
    """
    text = f"{image_mark(processor)}\n{question}"
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    begins = getattr(tokenizer_of(processor), "bos_token", None)  # templates write it themselves
    special = {"add_special_tokens": False} if begins and text.startswith(begins) else {}
    return processor(images=image, text=text, return_tensors="pt", **special, **processing)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor.

    Raises:
        UnsupportedModelError: it has none.
    """
    return look_up(processor, "tokenizer", role="tokenizer")


def n_unknown(processor: Any, text: str) -> int:
    """How many words or marks of a text the tokenizer does not know."""
    tokenizer = tokenizer_of(processor)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return 0 if tokenizer.unk_token_id is None else int(ids.count(tokenizer.unk_token_id))


def text_of(model: Any, processor: Any, ids: Any) -> str:
    """Generated ids of one row as text, up to the end of the sequence."""
    eos = end_ids(model)
    ends = set(eos if isinstance(eos, list) else [eos])
    row = list(takewhile(lambda number: number not in ends, map(int, ids)))
    return " ".join(tokenizer_of(processor).decode(row, skip_special_tokens=True).split())


def prompt_counts(model: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Length L of a prompt of ids, and placeholders of visual tokens in it, all rows together.

    Raises:
        UnsupportedModelError: the prompt or the id of the placeholders cannot be found.
    """
    prompt = prompt_of(inputs)
    if prompt is None or prompt.is_floating_point():
        raise missing("prompt of ids", of="the model's inputs", wanted=PROMPTS[:1], seen=inputs)
    config = model.config
    ids = {value for name in _PLACEHOLDERS if isinstance(value := getattr(config, name, None), int)}
    if not ids:
        raise missing("placeholder token", of=type(config).__name__, wanted=_PLACEHOLDERS, seen=vars(config))
    return prompt.shape[1], int(sum((prompt == number).sum() for number in ids))


def smaller_pixels(model: nn.Module, processor: Any, scale: float) -> dict[str, Any] | None:
    """Options of an image processor with a fixed `size`, for pixels so much smaller in whole patches; None where the
    size or the patches are not told."""
    images, vision = processor.image_processor, getattr(model.config, "vision_config", None)
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


def interpolators(model: nn.Module) -> list[nn.Module]:
    """Modules that can interpolate their position embeddings, if asked to."""
    return [
        module
        for module in model.modules()
        if callable(getattr(module, _INTERPOLATE, None))
        and _INTERPOLATE in inspect.signature(module.forward).parameters
    ]


def ask_to_interpolate(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an interpolator's call that make it interpolate."""
    return {**kwargs, _INTERPOLATE: True}


def quieten(*, bars: bool) -> None:
    """No chatter of libraries; progress bars where `bars` says so."""
    log = need("transformers", "logging", role="settings of its log")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    log.set_verbosity_error()
    if not bars:
        log.disable_progress_bar()
