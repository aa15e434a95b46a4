"""How right an answer is, from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable

from data import Sample

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def normal(text: str) -> str:
    """Lower case, without marks at the ends of words and articles, small numbers as digits."""
    words = re.sub(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)", " ", text.lower()).split()
    return " ".join(str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words if word not in _ARTICLES)


def exact(said: str, sample: Sample) -> float:
    """Whether it is, normalised, the answer or one of the answers."""
    return float(normal(said) in {normal(answer) for answer in (sample.answer, *sample.answers)})


def contains(said: str, sample: Sample) -> float:
    """Whether the answer's words stand in it, in their order: for models that answer in sentences."""
    return float(f" {normal(sample.answer)} " in f" {normal(said)} ")


def vqa(said: str, sample: Sample) -> float:
    """Accuracy of the VQA benchmark: agreement with three of the other people is right, averaged over who is left out;
    with a single answer, whether it is that."""
    answers = [normal(answer) for answer in sample.answers]
    if len(answers) < 2:
        return exact(said, sample)
    agree = [answer == normal(said) for answer in answers]
    return sum(min(1.0, (sum(agree) - one) / 3) for one in agree) / len(agree)


SCORES: dict[str, Callable[[str, Sample], float]] = {"exact": exact, "contains": contains, "vqa": vqa}
