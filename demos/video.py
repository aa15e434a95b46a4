"""Ask a vision-language model about a video, with all visual tokens and pruned, and draw which tokens were kept.

Without a path: a sample clip, made of photographs on first use. The embedded model gets the frames as so many images;
models that take videos get them as one:

    python demos/video.py clip.mp4 --model llava-hf/llava-onevision-qwen2-0.5b-ov-hf --frames 32 --method divprune
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
from asking import Loaded, answer, in_known_words, load, prepare_images, prepare_video, takes_videos
from clips import Clip, make_sample, read_clip, write_moving
from filmstrip import Film, animate, contact_sheet
from lasting import Lasting, Layout, lasting, layout_of
from options import check_output, is_embedded, keep, make_parser, methods_of, title_of
from options import parse as read
from overlay import Answer
from pictures import DemoError, frames_seen

import tokenprune

SAMPLE = Path("out/sample.mp4")
MOST_FRAMES = 512
PACE = 4.0  # frames a second of the animation
QUESTION = "What happens in this video?"
EMBEDDED_QUESTION = "how many digits are there ?"
NO_VIDEOS = (
    "The embedded model was trained on images of handwritten digits: what it answers about a video means nothing. "
    "What is shown is the selection of tokens, and what is measured is its cost."
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        DemoError: it makes no sense.
    """
    parser = make_parser(__doc__)
    parser.add_argument("path", nargs="?", type=Path, help="a video file; without it, a sample clip")
    parser.add_argument("--frames", type=int, default=32, help="frames to take, evenly spaced")
    parser.add_argument(
        "--method",
        help=f"one of {', '.join(tokenprune.list_methods())}; options and several go as in divprune:keep=0.5+aim "
        "(default: aim as published for videos)",
    )
    parser.add_argument("--keep", type=keep, help="of each frame: 0.25 = a quarter, 64 = 64 tokens")
    parser.add_argument("--question", help="what to ask")
    parser.add_argument("--output", type=Path, help="the animation, .mp4 or .gif (default: out/NAME-tokens.mp4)")
    options = read(parser, argv)
    if not 1 <= options.frames <= MOST_FRAMES:
        raise DemoError(f"argument --frames: must lie between 1 and {MOST_FRAMES}, got {options.frames}")
    return options


def source(options: argparse.Namespace) -> tuple[Clip, Path]:
    """The frames of the video that was asked for, or of the sample clip, and where the animation goes.

    Raises:
        DemoError: it cannot be read, or the animation cannot be written where it should be.
    """
    path = options.path or SAMPLE
    output = options.output or Path("out") / f"{path.stem}-tokens.mp4"
    check_output(output, options.path, ".mp4", ".gif", what="video")
    if options.path is None and not SAMPLE.exists():
        SAMPLE.parent.mkdir(parents=True, exist_ok=True)
        make_sample(SAMPLE)
        print(f"sample    {SAMPLE}, made of photographs of scikit-image")
    return read_clip(path, options.frames), output


@dataclass(frozen=True)
class Prompt:
    """A question about a clip, ready for ``generate``."""

    question: str
    inputs: dict[str, Any]
    layout: Layout


def prompt(clip: Clip, loaded: Loaded, options: argparse.Namespace) -> Prompt:
    """The question, the inputs, and where the frames' tokens stand in them."""
    question = options.question or (EMBEDDED_QUESTION if is_embedded(options) else QUESTION)
    inputs = _inputs(loaded, clip, question)
    return Prompt(question, inputs, layout_of(loaded.model, inputs))


def show(
    clip: Clip, asked: Prompt, output: Path, loaded: Loaded, session: tokenprune.Session, options: argparse.Namespace
) -> None:
    """Ask, print answers and report, write animation and contact sheet."""
    note = NO_VIDEOS if is_embedded(options) else ""
    print(f"video     {clip.name}, {len(clip.frames)} of {clip.n_total} frames, {clip.rate:.3g} frames a second")
    if note:
        print(f"note      {note}")
    question, inputs = asked.question, asked.inputs
    with session.pause():
        dense = answer(loaded, inputs, options.max_new_tokens)
    pruned = answer(loaded, inputs, options.max_new_tokens)
    traces = session.traces
    verdict = "same" if dense == pruned else "different"
    print(f"question  {question}\n  dense   {dense}\n  pruned  {pruned}   ({verdict})")
    tokens = lasting(traces, asked.layout)
    film = Film(
        frames_seen(loaded.processor, inputs, clip.frames),
        clip.seconds,
        _by_frame(tokens, len(clip.frames)),
        sum(len(one.depth) for one in tokens),
        sum(one.n_kept for one in tokens),
        title_of(session.methods),
        loaded.label,
        [Answer(question, dense, pruned)],
        note,
    )
    sheet = output.with_suffix(".png")
    write_moving(output, list(animate(film)), rate=PACE)
    try:
        contact_sheet(film).save(sheet, optimize=True)
    except OSError as error:
        raise DemoError(f"cannot write {sheet}: {error.strerror or error}") from error
    print(f"\n{session.report(inputs, max_new_tokens=options.max_new_tokens, repeats=3)}\n")
    print(f"animation {output}\nsheet     {sheet}\n")


def _inputs(loaded: Loaded, clip: Clip, question: str) -> dict[str, Any]:
    asked = in_known_words(loaded.processor, question)
    if not takes_videos(loaded):
        return prepare_images(loaded, clip.frames, asked)
    span = clip.seconds[-1] - clip.seconds[0]
    rate = (len(clip.frames) - 1) / span if span > 0 else clip.rate
    return prepare_video(loaded, clip.frames, asked, rate=rate)


def _by_frame(tokens: Sequence[Lasting], n_frames: int) -> list[Lasting]:
    """The tokens that stand for each frame: several frames may have been encoded as one."""
    return [tokens[number * len(tokens) // n_frames] for number in range(n_frames)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, or 2 with one line on stderr."""
    try:
        options = parse(argv)
        methods = (tokenprune.AIM.for_video(),)
        if options.method or options.keep is not None:
            methods = methods_of(options.method or "aim", keep=options.keep)
        clip, output = source(options)
        loaded = load(options.model, device=options.device, dtype=options.dtype)
        tokenprune.patch(loaded.model, methods).remove()  # what the model refuses is said first
        print(f"model     {loaded.label}\nmethod    {title_of(methods)}\n")
        asked = prompt(clip, loaded, options)
        with tokenprune.patch(loaded.model, methods) as session:
            show(clip, asked, output, loaded, session, options)
    except torch.OutOfMemoryError:
        print("error: this does not fit into the device's memory; try bfloat16 or fewer --frames", file=sys.stderr)
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
