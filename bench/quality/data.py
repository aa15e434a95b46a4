"""The data of the quality lab, as samples for evaluation and as tensors for training.

A sample is `(image, question, answer)`, perhaps with a type and several answers: a PIL image and strings. `evaluate.py`
takes any iterable of samples, so a real benchmark runs through the same code: yield its samples with the questions
about one image next to each other (the confidence intervals resample images, not questions), or write them to a
JSON-lines file (`jsonl.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from packing import Packed, pack_blocks
from PIL import Image
from questions import KINDS, Kind, words
from scenes import SceneConfig, Scenes, make_scenes


class Sample(NamedTuple):
    """One question about one image.

    Attributes:
        image: upright RGB.
        question: in plain words.
        answer: what is expected.
        type: kind of question, for accuracy apart; any word.
        answers: what several people answered, where a data set has that; see `scoring.py`.
    """

    image: Image.Image
    question: str
    answer: str
    type: str = "all"
    answers: tuple[str, ...] = ()


def make_dataset(split: str, n_images: int, seed: int) -> Iterator[Sample]:
    """Images of `split` ("train" or "eval") with one question of every type that has a single answer there.

    Args:
        split: "eval" uses only digits that no training image ever contains.
        n_images: Number of images; there are nearly eight times as many samples.
        seed: The same seed gives the same samples.
    """
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n_images, 100):
        scenes = make_scenes(split, min(100, n_images - start), generator)
        blocks = [kind(scenes, generator) for kind in KINDS]
        pixels = (scenes.pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for row, array in enumerate(pixels):
            image = Image.fromarray(array)
            for block in blocks:
                if block.valid[row]:
                    yield Sample(image, words(block.question[row]), words(block.answer[row]), block.kind)


def training_batch(
    n: int, generator: torch.Generator, config: SceneConfig | None, mix: tuple[Kind, ...]
) -> tuple[Scenes, Packed]:
    """`n` training images and packed questions, one of each kind in `mix`, about each of them, all as tensors."""
    scenes = make_scenes("train", n, generator, config)
    return scenes, pack_blocks([kind(scenes, generator) for kind in mix])


def by_image(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Neighbouring samples that share their image, together."""
    group: list[Sample] = []
    for sample in samples:
        if group and sample.image is not group[0].image:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
