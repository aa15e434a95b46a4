"""The demo's model: loaded from a folder or the hub, asked with all visual tokens and pruned."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overlay import Selection
from pictures import DemoError
from PIL import Image
from torch import Tensor

import tokenprune
from tokenprune.report import loading
from tokenprune.report.loading import one_line

EMBEDDED = Path(__file__).resolve().parent / "model"


class Loaded(loading.Loaded):
    """A model with its processor; the embedded one is called by the name of its folder in this repository."""

    @property
    def label(self) -> str:
        """Name, class, device and dtype."""
        if Path(self.name).resolve() == EMBEDDED and self.name != "demos/model":
            return replace(self, name="demos/model").label
        return super().label


def load(name: str, *, device: str, dtype: str) -> Loaded:
    """Load a model and its processor from a folder or the hub; see :func:`tokenprune.report.loading.load_model`."""
    found = loading.load_model(name, device=device, dtype=dtype)
    return Loaded(found.name, found.model, found.processor)


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
    """The question in words that the model knows, as far as it does; says so where it does not."""
    best, n_unknown = loading.in_known_words(processor, question)
    if n_unknown:
        print(f"note      the model does not know {n_unknown} of the words in {question!r}")
    return best


@contextmanager
def decoder_inputs(model: Any) -> Iterator[list[Tensor]]:
    """Catch what the decoder gets first, `[L, D]`."""
    caught: list[Tensor] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        tensors = [one for one in kwargs.values() if isinstance(one, Tensor)]
        embeds = [one for one in tensors if one.is_floating_point() and one.ndim == 3]  # masks have two or four axes
        if not caught and embeds:
            caught.append(embeds[0][0].detach())

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
