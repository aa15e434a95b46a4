"""The eight kinds of questions, in words and as tensors.

Words are the tokens: the tokenizer splits at white space, and every answer is made of the words below. Tensor
questions come in fixed-length blocks (one block per kind), so that a whole batch is built without a Python loop over
images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scenes import COLOURS, MAX_DIGITS, Scenes
from torch import Tensor

PAD, EOS, UNKNOWN, IMAGE_TOKEN = "<pad>", "</s>", "<unk>", "<image>"
_WORDS = "what digit is colour the how many digits are there a leftmost rightmost topmost bottommost yes no"
_MORE = "larger of and list from left to right ?"
DIGITS = [str(d) for d in range(10)]
VOCABULARY = list(dict.fromkeys([PAD, EOS, UNKNOWN, IMAGE_TOKEN, *DIGITS, *COLOURS, *_WORDS.split(), *_MORE.split()]))
WORD_ID = {word: i for i, word in enumerate(VOCABULARY)}
IGNORE = -100
_DIRECTIONS = ("leftmost", "rightmost", "topmost", "bottommost")
_DIGIT_0 = WORD_ID["0"]
_COLOUR_0 = WORD_ID[next(iter(COLOURS))]


@dataclass(frozen=True)
class Block:
    """One kind of question for a batch of images.

    Attributes:
        kind: Name of the question type.
        question: [B, q] word ids.
        answer: [B, a] word ids, end-of-sequence included, padded with `IGNORE`.
        valid: [B] whether the question has exactly one answer for this image.
    """

    kind: str
    question: Tensor
    answer: Tensor
    valid: Tensor


def _sentence(template: str, n: int, **slots: Tensor) -> Tensor:
    columns = []
    for word in template.split():
        name = word.strip("{}")
        columns.append(slots[name] if word.startswith("{") else torch.full((n,), WORD_ID[word]))
    return torch.stack(columns, 1)


def _short(answer: Tensor) -> Tensor:
    return torch.stack((answer, torch.full_like(answer, WORD_ID[EOS])), 1)


def _pick(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """[B, n] positions drawn without replacement where `weights` is true (anything where too few are)."""
    return torch.multinomial(weights.float() + 1e-6, n, generator=generator)


def _take(values: Tensor, slot: Tensor) -> Tensor:
    return values.gather(1, slot[:, None])[:, 0].clamp(min=0)


def _extreme(scenes: Scenes, direction: Tensor) -> Tensor:
    """[B] slot of the digit farthest in each row's direction."""
    key = scenes.centre.gather(2, (direction // 2)[:, None, None].expand(-1, MAX_DIGITS, 1))[..., 0]
    key = torch.where((direction % 2 == 0)[:, None], key, -key)
    return key.masked_fill(~scenes.present, torch.inf).argmin(1)


def digit_of_colour(scenes: Scenes, generator: torch.Generator) -> Block:
    slot = _pick(scenes.present, 1, generator)[:, 0]
    question = _sentence("what digit is {c} ?", len(slot), c=_take(scenes.colour, slot) + _COLOUR_0)
    return Block("digit of colour", question, _short(_take(scenes.digit, slot) + _DIGIT_0), scenes.present.any(1))


def colour_of_digit(scenes: Scenes, generator: torch.Generator) -> Block:
    same = (scenes.digit[:, :, None] == scenes.digit[:, None]).sum(-1) == 1
    unique = same & scenes.present
    slot = _pick(unique, 1, generator)[:, 0]
    question = _sentence("what colour is the {d} ?", len(slot), d=_take(scenes.digit, slot) + _DIGIT_0)
    return Block("colour of digit", question, _short(_take(scenes.colour, slot) + _COLOUR_0), unique.any(1))


def count(scenes: Scenes, generator: torch.Generator) -> Block:
    number = scenes.present.sum(1)
    question = _sentence("how many digits are there ?", len(number))
    return Block("count", question, _short(number + _DIGIT_0), torch.ones_like(number, dtype=torch.bool))


def exists(scenes: Scenes, generator: torch.Generator) -> Block:
    n = len(scenes.digit)
    there = torch.zeros(n, 11, dtype=torch.bool).scatter_(1, scenes.digit.where(scenes.present, 10), True)[:, :10]
    yes = torch.rand(n, generator=generator) < 0.5
    digit = _pick(there == yes[:, None], 1, generator)[:, 0]
    question = _sentence("is there a {d} ?", n, d=digit + _DIGIT_0)
    answer = torch.where(yes, WORD_ID["yes"], WORD_ID["no"])
    return Block("exists", question, _short(answer), torch.ones(n, dtype=torch.bool))


def digit_at(scenes: Scenes, generator: torch.Generator) -> Block:
    direction = torch.randint(4, (len(scenes.digit),), generator=generator)
    words = torch.tensor([WORD_ID[w] for w in _DIRECTIONS])[direction]
    question = _sentence("what digit is {w} ?", len(words), w=words)
    answer = _take(scenes.digit, _extreme(scenes, direction)) + _DIGIT_0
    return Block("digit at place", question, _short(answer), scenes.present.any(1))


def colour_at(scenes: Scenes, generator: torch.Generator) -> Block:
    direction = torch.randint(4, (len(scenes.digit),), generator=generator)
    words = torch.tensor([WORD_ID[w] for w in _DIRECTIONS])[direction]
    question = _sentence("what colour is {w} ?", len(words), w=words)
    answer = _take(scenes.colour, _extreme(scenes, direction)) + _COLOUR_0
    return Block("colour at place", question, _short(answer), scenes.present.any(1))


def larger(scenes: Scenes, generator: torch.Generator) -> Block:
    one, two = _pick(scenes.present, 2, generator).unbind(1)
    answer = torch.maximum(_take(scenes.digit, one), _take(scenes.digit, two)) + _DIGIT_0
    colours = {name: _take(scenes.colour, slot) + _COLOUR_0 for name, slot in (("c", one), ("e", two))}
    question = _sentence("larger of {c} and {e} ?", len(one), **colours)
    return Block("larger of two", question, _short(answer), scenes.present.sum(1) > 1)


def in_order(scenes: Scenes, generator: torch.Generator) -> Block:
    n = len(scenes.digit)
    order = scenes.centre[..., 0].masked_fill(~scenes.present, torch.inf).argsort(1)
    number = scenes.present.sum(1, keepdim=True)
    answer = torch.full((n, MAX_DIGITS + 1), IGNORE)
    answer[:, :MAX_DIGITS] = scenes.digit.gather(1, order) + _DIGIT_0
    at = torch.arange(MAX_DIGITS + 1)
    answer = answer.masked_fill(at == number, WORD_ID[EOS]).masked_fill(at > number, IGNORE)
    question = _sentence("list digits from left to right ?", n)
    return Block("list in order", question, answer, torch.ones(n, dtype=torch.bool))


Kind = Callable[[Scenes, torch.Generator], Block]
KINDS: tuple[Kind, ...] = (digit_of_colour, colour_of_digit, count, exists, digit_at, colour_at, larger, in_order)
TRAINING_MIX: tuple[Kind, ...] = (
    digit_of_colour,
    digit_of_colour,
    colour_of_digit,
    colour_of_digit,
    count,
    exists,
    exists,
    digit_at,
    digit_at,
    colour_at,
    larger,
    in_order,
)
PLACES_MIX = (*TRAINING_MIX, *(digit_at, colour_at) * 3, *(in_order,) * 6)
LISTS_MIX = (*TRAINING_MIX, digit_at, colour_at, *(in_order,) * 10)


def words(ids: Tensor) -> str:
    """The text of word ids, without end-of-sequence and padding."""
    return " ".join(VOCABULARY[i] for i in ids.tolist() if i != IGNORE and i != WORD_ID[EOS])
