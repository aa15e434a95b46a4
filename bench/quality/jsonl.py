"""Questions about images in JSON lines: read in the layouts that are common for visual question answering, and written.

    python bench/quality/jsonl.py --images 200 --seed 7 --output out/digits      # a fresh evaluation set as files
    python bench/quality/evaluate.py --data out/digits/questions.jsonl           # evaluated like any other

One object a line. The image is a path, relative to the file or to `--images`; the first key found counts:

* image: `image`, `image_path`, `image_file`, `file_name`;
* question: `question`, `text`, `query`, `prompt`;
* answer: `answer`, `label`, `gt_answer`, or `answers`, a list of strings or of objects with the key `answer`;
* type, perhaps: `type`, `question_type`, `category`;

or `conversations` as for training LLaVA (the first question and its answer). Lines that cannot be used are skipped and
counted by reason; a file of which nothing can be used is an error.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data import Sample, by_image, make_dataset
from PIL import Image

from tokenprune.errors import InputError
from tokenprune.report.loading import read_image

log = logging.getLogger("jsonl")
MOST_BYTES = 1 << 20  # of one line
IMAGE = ("image", "image_path", "image_file", "file_name")
QUESTION = ("question", "text", "query", "prompt")
ANSWER = ("answer", "label", "gt_answer", "answers")
TYPE = ("type", "question_type", "category")


class _Unusable(Exception):
    """A line that is left out; its text is the reason."""


def read_samples(path: Path, *, images: Path | None = None, skipped: Counter[str] | None = None) -> Iterator[Sample]:
    """Samples of a JSON-lines file, in its order. Neighbours with the same path share their image.

    Args:
        path: the file.
        images: folder that relative paths of images start from; the file's own where None.
        skipped: counts lines left out, by reason; a warning says the same at the end.

    Raises:
        InputError: the file cannot be read, or none of its lines can be used.
    """
    skipped = Counter() if skipped is None else skipped
    folder, first = images or path.parent, ""
    name, image, number, n_used = None, None, 0, 0
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = _row(line)
            if image is None or row[0] != name:
                image, name = _image(folder / row[0]), row[0]
            n_used += 1
            yield Sample(image, *row[1:])
        except _Unusable as reason:
            first = first or f"line {number}: {reason}"
            skipped[str(reason).split(":")[0]] += 1
    if skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        log.warning("%s: %d of %d lines skipped: %s (first, %s)", path, skipped.total(), number, counts, first)
    if not n_used:
        raise InputError(f"{path} has no line that can be used" + (f"; {first}" if first else ": it is empty"))


def _lines(path: Path) -> Iterator[bytes]:
    if path.is_dir():
        raise InputError(f"{path} is a folder; a file of JSON lines was expected")
    try:
        with path.open("rb") as file:
            while line := file.readline(MOST_BYTES + 1):
                yield line
                while len(line) > MOST_BYTES and not line.endswith(b"\n"):  # the rest of a line that is too long
                    line = file.readline(MOST_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _row(line: bytes) -> tuple[str, str, str, str, tuple[str, ...]]:
    """Image, question, answer, type and all answers of one line."""
    if not line.strip():
        raise _Unusable("empty")
    if len(line) > MOST_BYTES:
        raise _Unusable("too long")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _Unusable("broken JSON") from error
    if not isinstance(row, dict):
        raise _Unusable("no object")
    turns = row.get("conversations")
    if isinstance(turns, list) and len(turns) > 1 and all(isinstance(turn, dict) for turn in turns[:2]):
        question = str(turns[0].get("value", "")).replace("<image>", "").strip()
        row = {**row, "question": question, "answer": turns[1].get("value")}
    image = _text(row, IMAGE, "image")
    question = _text(row, QUESTION, "question")
    answers = _answers(row)
    kind = next((row[key] for key in TYPE if isinstance(row.get(key), str) and row[key]), "all")
    most = Counter(answers).most_common(1)[0][0]
    return image, question, most, kind, answers if len(answers) > 1 else ()


def _text(row: dict[str, Any], keys: tuple[str, ...], what: str) -> str:
    value = next((row[key] for key in keys if key in row), None)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise _Unusable(f"several {what}s")
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise _Unusable(f"without {what}")
    return value.strip()


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    value = next((row[key] for key in ANSWER if key in row), None)
    values = value if isinstance(value, list) else [value]
    values = [entry.get("answer") if isinstance(entry, dict) else entry for entry in values]
    found = [str(entry).strip() for entry in values if isinstance(entry, str | int | float)]
    found = [entry for entry in found if entry]
    if not found:
        raise _Unusable("without answer")
    return tuple(found)


def _image(path: Path) -> Image.Image:
    try:
        return read_image(path)
    except InputError as error:
        missing = "there is no file" in str(error)
        raise _Unusable(f"missing image: {path}" if missing else f"unreadable image: {error}") from error
    except (OSError, ValueError) as error:
        raise _Unusable(f"unreadable image: {error}") from error


def write_samples(samples: Iterable[Sample], folder: Path) -> Path:
    """Write samples as PNG files and `questions.jsonl`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "questions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, group in enumerate(by_image(samples)):
            name = f"{number:06d}.png"
            group[0].image.save(folder / name)
            for sample in group:
                row = {"image": name, "question": sample.question, "answer": sample.answer, "type": sample.type}
                file.write(json.dumps(row) + "\n")
    return path


def main() -> None:
    """Write a fresh evaluation set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    print(write_samples(make_dataset("eval", options.images, options.seed), options.output))


if __name__ == "__main__":
    main()
