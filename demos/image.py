"""Ask a vision-language model about a picture, with all visual tokens and pruned, and draw which tokens were kept.

Without arguments: the embedded model, which reads handwritten digits, on a photograph and on an image of digits.
With a connection to the Hugging Face hub (or a folder) any model that tokenprune supports:

    python demos/image.py --image photo.jpg --model llava-hf/llava-1.5-7b-hf --keep 0.25 --question "What is this?"
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from asking import EMBEDDED, Loaded, ask, in_known_words, load, prepare
from overlay import Answer, Figure, draw
from pictures import DemoError, photograph, read_image, seen_by
from PIL import Image

import tokenprune
from tokenprune.api import build_method

HERE = Path(__file__).resolve().parent
DIGITS = HERE / "assets" / "digits.png"
DIGIT_QUESTIONS = (
    "list digits from left to right ?",
    "what digit is leftmost ?",
    "what colour is topmost ?",
    "how many digits are there ?",
)
OPEN_QUESTION = "What is shown in this image?"
NO_PHOTOGRAPHS = (
    "The embedded model was trained on handwritten digits only: what it answers about any other picture means nothing. "
    "What this picture shows is the selection of tokens."
)


@dataclass(frozen=True)
class Picture:
    """An image, what to ask about it, and where its overlay goes."""

    name: str
    image: Image.Image
    questions: tuple[str, ...]
    output: Path
    note: str = ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DemoError(message)


def _keep(text: str) -> float | int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a fraction such as 0.25, a number of tokens such as 64, or auto (with --radius), got {text!r}"
        ) from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        DemoError: it makes no sense.
    """
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="an image file; without it, two built-in pictures")
    parser.add_argument(
        "--model", default=str(EMBEDDED), help="a name on the hub or a folder (default: the embedded one)"
    )
    parser.add_argument("--method", default="divprune", help=f"one of {', '.join(tokenprune.list_methods())}")
    parser.add_argument(
        "--keep", type=_keep, default=0.25, help="0.25 = a quarter, 64 = 64 tokens, auto (with --radius)"
    )
    parser.add_argument("--radius", type=float, help="with --keep auto: every dropped token is this near to a kept one")
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--max-new-tokens", type=int, help="default: 8 for the embedded model, 32 for others")
    parser.add_argument("--output", type=Path, help="the overlay, a .png file (default: out/NAME.png)")
    options = parser.parse_args(argv)
    if options.max_new_tokens is None:
        options.max_new_tokens = 8 if Path(options.model).resolve() == EMBEDDED else 32
    if options.max_new_tokens < 1:
        raise DemoError(f"argument --max-new-tokens: must be at least 1, got {options.max_new_tokens}")
    if any(not question.strip() for question in options.question or ()):
        raise DemoError("argument --question: must not be empty")
    if options.output and not options.image:
        raise DemoError("argument --output: goes with --image; the two built-in pictures are written to out/")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise DemoError("argument --device: cuda was asked for, but torch sees no CUDA device")
    return options


def pictures(options: argparse.Namespace) -> list[Picture]:
    """What to show: the image that was asked for, or the two built-in ones.

    Raises:
        DemoError: an image cannot be read, or its overlay cannot be written where it should be.
    """
    asked = tuple(options.question or ())
    embedded = Path(options.model).resolve() == EMBEDDED
    usual = asked or (DIGIT_QUESTIONS if embedded else (OPEN_QUESTION,))
    if options.image:
        output = options.output or Path("out") / f"{options.image.stem}.png"
        found = [Picture(options.image.stem, read_image(options.image), usual, output)]
    else:
        note = NO_PHOTOGRAPHS if embedded else ""
        once = asked or (usual[-1:] if embedded else usual)
        found = [
            Picture("astronaut", photograph(), once, Path("out/astronaut.png"), note),
            Picture("digits", read_image(DIGITS), usual, Path("out/digits.png")),
        ]
    for picture in found:
        _check_output(picture.output, options.image)
    return found


def _check_output(output: Path, image: Path | None) -> None:
    if output.suffix.lower() != ".png":
        raise DemoError(f"argument --output: must end in .png, got {output}")
    if output.is_dir() or (image and output.exists() and output.samefile(image)):
        raise DemoError(f"{output} is a folder or the image itself; say with --output where the overlay goes")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make the folder {output.parent}: {error.strerror}") from error


def show(picture: Picture, loaded: Loaded, session: tokenprune.Session, options: argparse.Namespace) -> None:
    """Ask all questions, print answers and report, write the overlay."""
    print(f"image     {picture.name}, {picture.image.width} x {picture.image.height} pixels")
    if picture.note:
        print(f"note      {picture.note}")
    answers, selections = [], []
    first: dict[str, Any] = {}
    for question in picture.questions:
        inputs = prepare(loaded, picture.image, in_known_words(loaded.processor, question))
        first = first or inputs
        dense, pruned, selection = ask(loaded, session, inputs, options.max_new_tokens)
        answers.append(Answer(question, dense, pruned))
        selections.append(selection)
        verdict = "same" if dense == pruned else "different"
        print(f"question  {question}\n  dense   {dense}\n  pruned  {pruned}   ({verdict})")
    seen = seen_by(loaded.processor, first, picture.image)
    title = f"{options.method}, keep {options.keep}" + ("" if options.radius is None else f", radius {options.radius}")
    notes = [picture.note] if picture.note else []
    if len({selection.kept for selection in selections}) > 1:
        notes.append("What is kept depends on the question here; shown is the choice for the first one.")
    figure = Figure(seen, selections[0], title, loaded.label, answers, " ".join(notes))
    try:
        draw(figure).save(picture.output, optimize=True)
    except OSError as error:
        raise DemoError(f"cannot write {picture.output}: {error.strerror or error}") from error
    print(f"\n{session.report(first, max_new_tokens=options.max_new_tokens)}\n")
    print(f"overlay   {picture.output}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, or 2 with one line on stderr."""
    try:
        options = parse(argv)
        method_options = {"keep": options.keep} | ({} if options.radius is None else {"radius": options.radius})
        method = build_method(options.method, **method_options)
        shown = pictures(options)
        loaded = load(options.model, device=options.device, dtype=options.dtype)
        with tokenprune.patch(loaded.model, method) as session:
            print(f"model     {loaded.label}\nmethod    {method!r}\n")
            for picture in shown:
                show(picture, loaded, session, options)
    except torch.OutOfMemoryError:
        print(f"error: {options.model} does not fit into the device's memory; try --dtype bfloat16", file=sys.stderr)
        return 2
    except (DemoError, tokenprune.TokenPruneError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    sys.exit(main())
