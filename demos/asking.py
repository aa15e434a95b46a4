"""The demo's model: loaded from a folder or the hub, asked with all visual tokens and pruned."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from overlay import Selection
from pictures import DemoError, one_line
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import tokenprune

EMBEDDED = Path(__file__).resolve().parent / "model"


@dataclass(frozen=True)
class Loaded:
    """A model with its processor, and the name it was asked for by."""

    name: str
    model: Any
    processor: Any

    @property
    def label(self) -> str:
        """Name, class, device and dtype."""
        weight = next(self.model.parameters())
        name = "demos/model" if Path(self.name).resolve() == EMBEDDED else self.name
        return f"{name} ({type(self.model).__name__}, {weight.device.type}, {str(weight.dtype).split('.')[-1]})"


def load(name: str, *, device: str, dtype: str) -> Loaded:
    """Load a model and its processor from a folder or the hub.

    Raises:
        DemoError: there is none, or not of a kind that takes images and text.
    """
    path = Path(name)
    if path.is_file():
        raise DemoError(f"{name} is a file; a model is a folder or a name on the hub")
    if not path.is_dir() and (
        name.count("/") > 1 or name[:1] in "./~" or (path.parts[0] and Path(path.parts[0]).is_dir())
    ):
        raise DemoError(f"there is no model folder {name}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = ("float32" if device == "cpu" else "auto") if dtype == "auto" else dtype
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise DemoError(f"{name} is a {config.model_type} model, which does not turn images and text into text")
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        if not hasattr(processor, "image_processor"):
            raise DemoError(f"{name} has no processor for images")
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=kind).eval().to(device)
    except (DemoError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a checkpoint can be wrong in as many ways as there are loaders
        raise DemoError(f"the model {name} cannot be loaded: {one_line(error)}") from error
    return Loaded(name, model, processor)


def prepare(loaded: Loaded, image: Image.Image, question: str) -> dict[str, Any]:
    """Inputs of ``generate`` for one image and one question.

    Raises:
        DemoError: the model's processor refuses them.
    """
    return prepare_images(loaded, [image], question)


def prepare_images(loaded: Loaded, images: Sequence[Image.Image], question: str) -> dict[str, Any]:
    """Inputs of ``generate`` for images, in this order, and a question about them.

    Raises:
        DemoError: the model's processor refuses them.
    """
    processor = loaded.processor
    mark = getattr(processor, "image_token", None) or "<image>"
    _check_marks(question, mark)
    try:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": image} for image in images]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            text = "".join(f"{mark}\n" for _ in images) + question
            inputs = processor(images=list(images), text=text, return_tensors="pt")
    except Exception as error:  # processors refuse odd sizes and shapes each in their own way
        raise DemoError(
            f"the processor of {loaded.name} refuses this picture or question: {one_line(error)}"
        ) from error
    return _placed(loaded, inputs)


def takes_videos(loaded: Loaded) -> bool:
    """Whether the model takes the frames of a video as such, not only as so many images."""
    config, processor = loaded.model.config, loaded.processor
    found = getattr(config, "video_token_id", None) or getattr(config, "video_token_index", None)
    return found is not None and getattr(processor, "video_processor", None) is not None


def prepare_video(loaded: Loaded, frames: Sequence[Image.Image], question: str, *, rate: float) -> dict[str, Any]:
    """Inputs of ``generate`` for a video and a question about it.

    Args:
        loaded: a model that takes videos.
        frames: the frames, sampled already.
        question: what to ask.
        rate: frames a second among `frames`, for models that are told times.

    Raises:
        DemoError: the model's processor refuses them.
    """
    processor = loaded.processor
    mark = getattr(processor, "video_token", None) or "<video>"
    _check_marks(question, mark)
    content = [{"type": "video"}, {"type": "text", "text": question}]
    number = len(frames)
    times = {"fps": rate, "duration": number / rate, "frames_indices": list(range(number))}
    try:
        text = f"{mark}\n{question}"
        if getattr(processor, "chat_template", None):
            chat = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=[text],
            videos=[np.stack([np.asarray(frame) for frame in frames])],
            do_sample_frames=False,
            video_metadata=[{"total_num_frames": number, **times}],
            return_tensors="pt",
        )
    except Exception as error:
        raise DemoError(f"the processor of {loaded.name} refuses these frames: {one_line(error)}") from error
    return _placed(loaded, inputs)


def _check_marks(question: str, mark: str) -> None:
    if mark in question:
        raise DemoError(f"argument --question: must not hold {mark}, which stands for the picture")


def _placed(loaded: Loaded, inputs: Any) -> dict[str, Any]:
    """Inputs on the model's device, in its dtype."""
    weight = next(loaded.model.parameters())
    return dict(inputs.to(weight.device, dtype=weight.dtype))


def in_known_words(processor: Any, question: str) -> str:
    """The question as it is or, where a small vocabulary lacks some of it, in lower case with marks set apart."""
    tokenizer = processor.tokenizer

    def unknown(text: str) -> int:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)

    simple = " ".join(re.findall(r"\w+|[^\w\s]", question.lower()))
    best = min(question, simple, key=unknown)
    if n_unknown := unknown(best):
        print(f"note      the model does not know {n_unknown} of the words in {question!r}")
    return best


@contextmanager
def decoder_inputs(model: Any) -> Iterator[list[Tensor]]:
    """Catch what the decoder gets first, `[L, D]`."""
    caught: list[Tensor] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        embeds = kwargs.get("inputs_embeds")
        if not caught and isinstance(embeds, Tensor):
            caught.append(embeds[0].detach())

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield caught
    finally:
        handle.remove()


def select(
    traces: Sequence[tokenprune.Trace], embeds: Tensor, grids: Sequence[tuple[int, int] | None] = ()
) -> Selection:
    """Which visual tokens went on, and which of these is nearest to each of the others.

    Args:
        traces: of the pruned run.
        embeds: what the decoder got in the dense run, `[L, D]`.
        grids: of the images, for methods that only act inside the decoder, which do not see them.

    Raises:
        DemoError: the method did not see the image's tokens.
    """
    applied = [trace for trace in traces if trace.visual_indices and len(trace.kept_indices[0])]
    if not applied:
        reasons = ", ".join(dict.fromkeys(trace.reason for trace in traces)) or "it left no trace"
        raise DemoError(f"the method did not act on the image's tokens: {reasons}")
    visual = applied[0].visual_indices[0]
    chosen = [trace for trace in applied if trace.site == "before_llm"] or applied
    kept = torch.searchsorted(visual, chosen[-1].kept_indices[0])
    features = torch.nn.functional.normalize(embeds[visual.to(embeds.device)].float(), dim=-1).cpu()
    similarity, nearest = (features @ features[kept].T).max(dim=1)
    nearest = kept[nearest]
    nearest[kept], similarity[kept] = kept, 1.0
    grids = applied[0].grids[0] if applied[0].grids else grids
    distance = (1 - similarity).clamp(min=0)
    grid = grids[0] if len(grids) == 1 else None
    return Selection(tuple(kept.tolist()), tuple(nearest.tolist()), tuple(distance.tolist()), grid)


def answer(loaded: Loaded, inputs: dict[str, Any], limit: int) -> str:
    """What the model says, by greedy decoding of at most `limit` tokens."""
    choice = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    ids = loaded.model.generate(**inputs, max_new_tokens=limit, **choice)[0, inputs["input_ids"].shape[1] :]
    return " ".join(loaded.processor.tokenizer.decode(ids, skip_special_tokens=True).split()) or "(nothing)"


def ask(
    loaded: Loaded,
    session: tokenprune.Session,
    inputs: dict[str, Any],
    limit: int,
    grids: Sequence[tuple[int, int] | None] = (),
) -> tuple[str, str, Selection]:
    """The answers with all tokens and pruned, and which tokens were kept; `grids` as in :func:`select`."""
    with session.pause(), decoder_inputs(loaded.model) as embeds:
        dense = answer(loaded, inputs, limit)
    pruned = answer(loaded, inputs, limit)
    return dense, pruned, select(session.traces, embeds[0], grids)
