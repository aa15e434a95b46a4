"""Ask a vision-language model about a picture, with all visual tokens and pruned, and draw which tokens were kept.

Without arguments: the embedded model, which reads handwritten digits, on a photograph and on an image of digits.
With a connection to the Hugging Face hub (or a folder) any model that tokenprune supports:

    python demos/image.py --image photo.jpg --model llava-hf/llava-1.5-7b-hf --keep 0.25 --question "What is this?"

With --vit a vision transformer of timm instead, and which patches each of its last tokens stands for:

    python demos/image.py --vit --method tome:r=9
    python demos/image.py --vit vit_base_patch16_224 --image photo.jpg --method tome:r=13
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from asking import Loaded, ask, in_known_words, load, prepare
from lasting import layout_of
from options import check_output, is_embedded, keep, make_parser, methods_of, title_of
from options import parse as read
from overlay import Answer, Figure, draw
from patches import EMBEDDED_VIT, draw_patches, load_encoder
from pictures import DemoError, photograph, read_image, seen_by
from PIL import Image

import tokenprune

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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        DemoError: it makes no sense.
    """
    parser = make_parser(__doc__)
    parser.add_argument("--image", type=Path, help="an image file; without it, two built-in pictures")
    parser.add_argument(
        "--method",
        help="divprune (with --vit: tome with keep 0.25) unless another is named; options and several go as in "
        f"uniform:keep=0.5+divprune; known are {', '.join(tokenprune.list_methods())}",
    )
    parser.add_argument("--keep", type=keep, help="0.25 = a quarter, 64 = 64 tokens, auto (with --radius)")
    parser.add_argument("--radius", type=float, help="with --keep auto: every dropped token is this near to a kept one")
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument("--vit", nargs="?", const=EMBEDDED_VIT, help="a name that timm knows; alone: the embedded one")
    parser.add_argument("--output", type=Path, help="the overlay, a .png file (default: out/NAME.png)")
    asked = read(parser, argv)
    if asked.vit and not asked.method and asked.keep is None:
        asked.keep = 0.25
    asked.method = asked.method or ("tome" if asked.vit else "divprune")
    if asked.output and not asked.image:
        raise DemoError("argument --output: goes with --image; the two built-in pictures are written to out/")
    return asked


def pictures(options: argparse.Namespace) -> list[Picture]:
    """What to show: the image that was asked for, or the two built-in ones.

    Raises:
        DemoError: an image cannot be read, or its overlay cannot be written where it should be.
    """
    asked = tuple(options.question or ())
    embedded = is_embedded(options)
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
        check_output(picture.output, options.image, ".png")
    return found


def show(picture: Picture, loaded: Loaded, methods: Sequence[tokenprune.Method], options: argparse.Namespace) -> None:
    """Ask all questions, print answers and report, write the overlay."""
    print(f"image     {picture.name}, {picture.image.width} x {picture.image.height} pixels")
    if picture.note:
        print(f"note      {picture.note}")
    prompts = [
        prepare(loaded, picture.image, in_known_words(loaded.processor, question)) for question in picture.questions
    ]
    grids = layout_of(loaded.model, prompts[0]).grids
    with tokenprune.patch(loaded.model, methods) as session:
        _show(picture, prompts, grids, loaded, session, options)


def _show(
    picture: Picture,
    prompts: Sequence[dict[str, Any]],
    grids: Sequence[tuple[int, int] | None],
    loaded: Loaded,
    session: tokenprune.Session,
    options: argparse.Namespace,
) -> None:
    answers, selections = [], []
    for question, inputs in zip(picture.questions, prompts, strict=True):
        dense, pruned, selection = ask(loaded, session, inputs, options.max_new_tokens, grids)
        answers.append(Answer(question, dense, pruned))
        selections.append(selection)
        verdict = "same" if dense == pruned else "different"
        print(f"question  {question}\n  dense   {dense}\n  pruned  {pruned}   ({verdict})")
    seen = seen_by(loaded.processor, prompts[0], picture.image)
    title = title_of(session.methods)
    notes = [picture.note] if picture.note else []
    if len({selection.kept for selection in selections}) > 1:
        notes.append("What is kept depends on the question here; shown is the choice for the first one.")
    figure = Figure(seen, selections[0], title, loaded.label, answers, " ".join(notes))
    try:
        draw(figure).save(picture.output, optimize=True)
    except OSError as error:
        raise DemoError(f"cannot write {picture.output}: {error.strerror or error}") from error
    print(f"\n{session.report(prompts[0], max_new_tokens=options.max_new_tokens)}\n")
    print(f"overlay   {picture.output}\n")


def show_encoder(options: argparse.Namespace) -> None:
    """Draw what the tokens of a vision transformer stand for."""
    methods = methods_of(options.method, keep=options.keep, radius=options.radius)
    shown = [picture for picture in pictures(options) if options.image or picture.name == "digits"]
    encoder = load_encoder(options.vit)
    for picture in shown:
        output = options.output or picture.output.with_stem(f"{picture.output.stem}-patches")
        page, told = draw_patches(encoder, picture.image, methods, title_of(methods))
        try:
            page.save(output, optimize=True)
        except OSError as error:
            raise DemoError(f"cannot write {output}: {error.strerror or error}") from error
        print(f"image     {picture.name}\n  {told}\noverlay   {output}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, or 2 with one line on stderr."""
    try:
        options = parse(argv)
        if options.vit:
            show_encoder(options)
            return 0
        methods = methods_of(options.method, keep=options.keep, radius=options.radius)
        shown = pictures(options)
        loaded = load(options.model, device=options.device, dtype=options.dtype)
        tokenprune.patch(loaded.model, methods).remove()  # what the model refuses is said first
        print(f"model     {loaded.label}\nmethod    {title_of(methods)}\n")
        for picture in shown:
            show(picture, loaded, methods, options)
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
