"""The command line: ``tokenprune report``, ``compare``, ``methods``, ``families``. The only place that prints."""

import argparse
import inspect
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from tokenprune import __version__, api
from tokenprune.errors import OptionError, TokenPruneError
from tokenprune.methods import METHODS
from tokenprune.methods.base import options_of
from tokenprune.parsing import methods_with, split_methods
from tokenprune.report import loading, plots
from tokenprune.upstream.families import FAMILIES, REFUSED
from tokenprune.upstream.loading import quieten

DESCRIPTION = "Prune the visual tokens of a vision-language model, and see what that saves and what it changes."
QUESTION = "What is shown in this image?"
SPEC = "name or name:option=value,... (see tokenprune methods)"
KEEP = "how many visual tokens are kept: 0.25 = a quarter, 64 = 64 per image; 1 is one token, 1.0 is all"
COMPARE = """\
several methods and keeps on one image: agreement, latency, memory. A method whose own options say how much is kept
(aim, spatten, divprune:keep=0.3) has one row, without keep; one that prunes inside the decoder costs more than keep of
the tokens. The column cost says what each row costs the decoder: compare rows that cost alike."""
EXAMPLES = """\
examples:
  tokenprune report --model llava-hf/llava-1.5-7b-hf --image photo.jpg --method divprune --keep 0.25
  tokenprune compare --model demos/model --image demos/assets/digits.png --question "what digit is leftmost ?" \\
      --methods divprune,random,uniform,resize --keep 0.5,0.25,0.1 --plot compare.png
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see {self.prog} --help")


def _keep(text: str) -> float:
    if text == "auto":
        raise argparse.ArgumentTypeError(
            "auto needs a radius, and both are written with the method: divprune:keep=auto,radius=0.05"
        )
    is_count = text.strip().lstrip("+-").isdecimal()
    try:
        return int(text) if is_count else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"keep is a fraction such as 0.25 or a number of tokens such as 64, got {text!r}"
        ) from None


def _keeps(text: str) -> list[float]:
    return [_keep(part.strip()) for part in text.split(",")]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


MODEL_OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"required": True, "help": "a folder or a name on the hub"},
    "--image": {"required": True, "type": Path, "help": "an image file"},
    "--device": {"choices": loading.DEVICES, "default": "auto", "help": "default: %(default)s, CUDA where it is"},
    "--dtype": {
        "choices": loading.DTYPES,
        "default": "auto",
        "help": "default: %(default)s, float32 on a CPU, else the model's own",
    },
    "--max-new-tokens": {"type": _positive, "default": 16, "help": "default: %(default)s"},
    "--repeats": {"type": _positive, "default": 5, "help": "timed runs of each side (default: %(default)s)"},
    "--plot": {"type": Path, "help": "write a picture there (.png, .svg, .pdf)"},
    "--json": {"action": "store_true", "help": "as JSON"},
}
REPORT_OPTIONS: dict[str, dict[str, Any]] = {
    "--method": {"default": "divprune", "help": f"{SPEC}; several in a row joined by + (default: %(default)s)"},
    "--keep": {"type": _keep, "help": f"{KEEP} (default: the method's)"},
    "--question": {"default": QUESTION, "help": "default: %(default)s"},
    "--positions": {
        "choices": ("original", "packed"),
        "default": "original",
        "help": "of kept tokens: those of the unpruned prompt, or renumbered without gaps (default: %(default)s)",
    },
}
COMPARE_OPTIONS: dict[str, dict[str, Any]] = {
    "--methods": {
        "default": "divprune,random,uniform,resize",
        "help": f"with commas between, each as {SPEC}; or resize: no pruning, the image itself made smaller to about "
        "as many tokens (default: %(default)s)",
    },
    "--keep": {"type": _keeps, "default": [0.5, 0.25, 0.1], "help": f"{KEEP} (default: 0.5,0.25,0.1)"},
    "--question": {"action": "append", "help": f"may be given several times (default: {QUESTION})"},
    "--answer": {"action": "append", "default": [], "help": "the right one, for each question"},
    "--repeats": {**MODEL_OPTIONS["--repeats"], "default": 3},
}
LIST_OPTIONS = {"--json": MODEL_OPTIONS["--json"]}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        "tokenprune", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"tokenprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, description, options in (
        (
            _report,
            "dense against pruned on one image: latency, memory, arithmetic, drift",
            MODEL_OPTIONS | REPORT_OPTIONS,
        ),
        (_compare, COMPARE, MODEL_OPTIONS | COMPARE_OPTIONS),
        (_methods, "list the methods with their options", LIST_OPTIONS),
        (_families, "list the families of models that can be pruned", LIST_OPTIONS),
    ):
        summary = description.partition(". ")[0]
        command = commands.add_parser(run.__name__[1:], help=summary, description=description)
        command.set_defaults(run=run)
        for flag, settings in options.items():
            command.add_argument(flag, **settings)
    return parser


def _load(options: argparse.Namespace, questions: Sequence[str]) -> tuple[loading.Loaded, Any, list[str]]:
    """The model, the image, and the questions in words that the model knows."""
    if empty := [question for question in questions if not question.strip()]:
        raise OptionError(f"a question must not be empty, got {empty[0]!r}")
    if options.plot:
        plots.check_target(options.plot)
    image = loading.read_image(options.image)
    loaded = loading.load_model(options.model, device=options.device, dtype=options.dtype)
    asked = []
    for question in questions:
        known, n_unknown = loading.in_known_words(loaded.processor, question)
        if n_unknown:
            options.notes.append(f"note: the model does not know {n_unknown} of the words in {question!r}")
        asked.append(known)
    return loaded, image, asked


def _report(options: argparse.Namespace) -> None:
    methods = methods_with(options.method, **({} if options.keep is None else {"keep": options.keep}))
    loaded, image, (question,) = _load(options, [options.question])
    inputs = loading.prepare(loaded, image, question)
    with api.patch(loaded.model, list(methods), positions=options.positions) as session:
        report = session.report(inputs, max_new_tokens=options.max_new_tokens, repeats=options.repeats)
    if options.plot:
        report.plot(options.plot)
    print(report.to_json() if options.json else f"model: {loaded.label}\n{report}")


def _compare(options: argparse.Namespace) -> None:
    from tokenprune.report.compare import check_methods, compare

    methods = split_methods(options.methods)
    check_methods(methods, options.keep)
    loaded, image, questions = _load(options, options.question or [QUESTION])
    result = compare(
        loaded,
        image,
        questions,
        methods=methods,
        keeps=options.keep,
        expected=options.answer,
        max_new_tokens=options.max_new_tokens,
        repeats=options.repeats,
    )
    if options.plot:
        result.plot(options.plot)
    print(result.to_json() if options.json else result)


def _methods(options: argparse.Namespace) -> None:
    found: list[dict[str, Any]] = []
    for name, method in sorted(METHODS.items()):
        summary = (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ")
        found.append({"name": name, "class": method.__name__, "options": options_of(method), "summary": summary})
    if options.json:
        print(json.dumps(found, indent=2, default=repr))
        return
    for entry in found:
        shown = ", ".join(f"{key}={value!r}" for key, value in entry["options"].items())
        print(textwrap.fill(f"{entry['name']}: {entry['summary']}", 100, subsequent_indent="    "))
        print(textwrap.fill(f"options: {shown}", 100, initial_indent="    ", subsequent_indent="        "))


def _families(options: argparse.Namespace) -> None:
    decoders = {family.name: family for family in FAMILIES}
    rows: list[dict[str, Any]] = []
    for name in api.list_families():
        row: dict[str, Any] = {"name": name, "kind": "vision encoder", "takes": ["images"], "positions": [], "note": ""}
        if (family := decoders.get(name)) is not None:
            row |= {"kind": "vision-language model", "note": family.note}
            row["takes"] = ["images", "videos"] if family.video else ["images"]
            row["positions"] = ["original"] if family.mrope else ["original", "packed"]
        rows.append(row)
    if options.json:
        print(json.dumps({"supported": rows, "refused": REFUSED}, indent=2))
        return
    for entry in rows:
        cells = (entry["name"], entry["kind"], ", ".join(entry["takes"]), ", ".join(entry["positions"]))
        print(("{:<24}{:<23}{:<16}{:<18}".format(*cells) + entry["note"]).rstrip())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 with one line on stderr."""
    try:
        options = make_parser().parse_args(argv, argparse.Namespace(notes=[]))
        quieten(bars=sys.stderr.isatty())  # no chatter between the lines, and bars for a terminal alone
        options.run(options)
        for note in options.notes:
            print(note, file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: the model does not fit into the device's memory; try --dtype bfloat16", file=sys.stderr)
        return 2
    except TokenPruneError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
