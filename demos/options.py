"""What the demos' command lines have in common."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from asking import EMBEDDED
from pictures import DemoError

import tokenprune
from tokenprune.parsing import methods_with

AMOUNTS = ("keep", "merge", "prune", "r", "radius", "layer", "tokens", "heads")  # options that are always told


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of printing how to use it."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line."""
        raise DemoError(message)


def keep(text: str) -> float | int | str:
    """A value of `--keep`."""
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


def make_parser(description: str | None) -> Parser:
    """A parser with the options that every demo has."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(EMBEDDED), help="a name on the hub or a folder (default: the embedded one)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--max-new-tokens", type=int, help="default: 8 for the embedded model, 32 for others")
    return parser


def is_embedded(options: argparse.Namespace) -> bool:
    """Whether the model asked for is the one that comes with the demos."""
    return Path(options.model).resolve() == EMBEDDED


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and check what every demo has.

    Raises:
        DemoError: it makes no sense.
    """
    options = parser.parse_args(argv)
    if options.max_new_tokens is None:
        options.max_new_tokens = 8 if is_embedded(options) else 32
    if options.max_new_tokens < 1:
        raise DemoError(f"argument --max-new-tokens: must be at least 1, got {options.max_new_tokens}")
    questions = options.question if isinstance(options.question, list) else [options.question or "?"]
    if any(not question.strip() for question in questions):
        raise DemoError("argument --question: must not be empty")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise DemoError("argument --device: cuda was asked for, but torch sees no CUDA device")
    return options


def check_output(output: Path, source: Path | None, *suffixes: str, what: str = "image") -> None:
    """Make the folder for `output`.

    Raises:
        DemoError: it has another ending, is a folder or the source itself, or its folder cannot be made.
    """
    if output.suffix.lower() not in suffixes:
        raise DemoError(f"argument --output: must end in {' or '.join(suffixes)}, got {output}")
    if output.is_dir() or (source and output.exists() and source.exists() and output.samefile(source)):
        raise DemoError(f"{output} is a folder or the {what} itself; say with --output where the overlay goes")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make the folder {output.parent}: {error.strerror}") from error


def methods_of(text: str, **options: Any) -> tuple[tokenprune.Method, ...]:
    """The methods of `--method`, with what other options say for those methods that do not say it themselves.

    Raises:
        OptionError: the text cannot be read, or no method takes an option that was given.
    """
    return methods_with(text, **{name: value for name, value in options.items() if value is not None})


def title_of(methods: Sequence[tokenprune.Method]) -> str:
    """The methods with what says how much they keep, and the options that are not as usual."""
    return " + ".join(", ".join([method.name or type(method).__name__, *settings_of(method)]) for method in methods)


def settings_of(method: tokenprune.Method) -> list[str]:
    """What says how much a method keeps, and the options that are not as usual: `keep 0.25`."""
    found = []
    for entry in dataclasses.fields(method):
        value = getattr(method, entry.name)
        told = entry.name in AMOUNTS and value is not None
        if entry.repr and (told or value != entry.default):
            found.append(f"{entry.name} {_short(value)}")
    return found


def _short(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " to ".join(_short(part) for part in value) if len(value) == 2 else ", ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
