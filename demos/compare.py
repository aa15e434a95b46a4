"""Ask a vision-language model about one picture with every method, and draw what each of them keeps, side by side.

Without arguments: the embedded model, which reads handwritten digits, on a photograph and on an image of digits. With a
connection to the Hugging Face hub (or a folder) any model that tokenprune supports:

    python demos/compare.py --image photo.jpg --model llava-hf/llava-1.5-7b-hf --keep 0.25 --question "What is this?"
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from asking import Loaded, in_known_words, load
from cards import Card, Sheet, draw
from image import Picture, pictures
from lasting import Lasting, Layout, lasting, layout_of
from options import check_output, make_parser, settings_of
from options import keep as keep_option
from options import parse as read
from pictures import DemoError, seen_by
from PIL import Image

import tokenprune
from tokenprune.parsing import split_methods
from tokenprune.report.compare import RESIZE, Candidate, Row, candidates, check_methods, compare
from tokenprune.report.loading import n_visual

LAST = ("random", "uniform", RESIZE)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        DemoError: it makes no sense.
    """
    parser = make_parser(__doc__)
    methods = [name for name in tokenprune.list_methods() if name not in LAST]
    parser.add_argument("--image", type=Path, help="an image file; without it, two built-in pictures")
    parser.add_argument("--methods", help=f"with commas between (default: {','.join([*methods, *LAST])})")
    parser.add_argument("--keep", type=keep_option, default=0.25, help="0.25 = a quarter, 64 = 64 tokens")
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each method")
    parser.add_argument("--output", type=Path, help="a .png file (default: out/compare-NAME.png)")
    options = read(parser, argv)
    if options.keep == "auto":
        raise DemoError("argument --keep: a number, so that all methods can be compared at it")
    if options.repeats < 1:
        raise DemoError(f"argument --repeats: must be at least 1, got {options.repeats}")
    if options.output and not options.image:
        raise DemoError("argument --output: goes with --image; the two built-in pictures are written to out/")
    options.all = options.methods is None
    options.methods = split_methods(options.methods) if options.methods else [*methods, *LAST]
    check_methods(options.methods, [options.keep])
    return options


def _able(
    loaded: Loaded, image: Image.Image, questions: Sequence[str], options: argparse.Namespace
) -> tuple[list[str], list[str]]:
    """The methods that this model can do, and why not the others; what was asked for by name has to be possible."""
    found, notes = [], []
    for text in options.methods:
        try:
            possible, _ = candidates(loaded, image, questions[:1], [text], [options.keep])
            found += [text] if len(possible) > 1 or text == RESIZE else []
        except tokenprune.TokenPruneError as error:
            if not options.all:
                raise
            notes.append(f"{text} is left out: {error}")
    return found, notes


def show(picture: Picture, output: Path, loaded: Loaded, options: argparse.Namespace) -> None:
    """Ask every method all questions, print the table, write the picture."""
    print(f"image     {picture.name}, {picture.image.width} x {picture.image.height} pixels")
    questions = [in_known_words(loaded.processor, question) for question in picture.questions]
    methods, notes = _able(loaded, picture.image, questions, options)
    found, _ = candidates(loaded, picture.image, questions, methods, [options.keep])
    result = compare(
        loaded,
        picture.image,
        questions,
        methods=methods,
        keeps=[options.keep],
        max_new_tokens=options.max_new_tokens,
        repeats=options.repeats,
    )
    print(f"\n{result}\n")
    for number, question in enumerate(questions):
        print(f"question  {question}")
        for row in result.rows:
            print(f"  {row.method:24} {row.answers[number] or '(nothing)'}")
    layout = layout_of(loaded.model, found[0].inputs[0])
    pairs = zip(found, result.rows, strict=True)
    cards = [_card(loaded, picture.image, one, row, result.rows[0], layout) for one, row in pairs]
    stats = [(f"{sum(layout.sizes):,}", "visual tokens")]
    if any(one.keep == options.keep for one in found[1:]):
        stats.append((f"{options.keep:g}", "keep"))
    note = " ".join(
        [picture.note, *(f"{one[:1].upper()}{one[1:].rstrip('.')}." for one in (*notes, *result.notes))]
    ).strip()
    sheet = Sheet(f"{len(cards)} ways to look at it", loaded.label, stats, picture.questions, cards, note)
    try:
        draw(sheet).save(output, optimize=True)
    except OSError as error:
        raise DemoError(f"cannot write {output}: {error.strerror or error}") from error
    print(f"\npicture   {output}\n")


def _card(loaded: Loaded, image: Image.Image, one: Candidate, row: Row, dense: Row, layout: Layout) -> Card:
    inputs = dict(one.inputs[0])
    faster = dense.first_token_latency_ms[0] / row.first_token_latency_ms[0]
    figures = [
        f"{row.visual_tokens:,.4g} tokens, mean over the layers",
        f"first token {row.first_token_latency_ms[0]:.3g} ms" + ("" if row is dense else f" ({faster:.2f}x)"),
        "" if row.kv_mib is None else f"KV cache {row.kv_mib:.3g} MiB",
    ]
    tokens, grid = None, None
    if one.methods:
        tokens = _tokens(loaded, one, inputs, layout)
    else:
        side = math.isqrt(n_visual(loaded.model, inputs))
        grid = (side, side) if side * side == n_visual(loaded.model, inputs) else None
    return Card(
        row.method.partition(":")[0] if "+" not in row.method else row.method,
        {"dense": "all tokens", RESIZE: "the image itself made smaller"}.get(row.method) or _options(one),
        seen_by(loaded.processor, inputs, image),
        tokens,
        grid,
        [figure for figure in figures if figure],
        [answer or "(nothing)" for answer in row.answers],
        [] if row is dense else [answer == said for answer, said in zip(row.answers, dense.answers, strict=True)],
    )


def _options(one: Candidate) -> str:
    """How a method is set, without its name."""
    return " + ".join(", ".join(settings_of(method)) or "as usual" for method in one.methods)


def _tokens(loaded: Loaded, one: Candidate, inputs: dict[str, Any], layout: Layout) -> Lasting | None:
    """How long the tokens last under one method; None where all of them reach the language model's end."""
    with tokenprune.patch(loaded.model, list(one.methods)) as session, torch.inference_mode():
        loaded.model(**inputs, use_cache=False)
        if not any(trace.status == "applied" and trace.visual_indices for trace in session.traces):
            return None
        parts = lasting(session.traces, layout)
    if len(parts) == 1:
        return parts[0]
    return Lasting(tuple(depth for part in parts for depth in part.depth), parts[0].stages, None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, or 2 with one line on stderr."""
    try:
        options = parse(argv)
        shown = []
        for picture in pictures(options):
            given = options.output or picture.output.with_name(f"compare-{picture.name}.png")
            check_output(given, options.image, ".png")
            shown.append((picture, given))
        loaded = load(options.model, device=options.device, dtype=options.dtype)
        print(f"model     {loaded.label}\n")
        for picture, output in shown:
            show(picture, output, loaded, options)
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
