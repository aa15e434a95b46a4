"""Accuracy per question type of every method at equal arithmetic, dense and pruned, with baselines and intervals.

    python bench/quality/evaluate.py                                        # the embedded model, fresh held-out images
    python bench/quality/evaluate.py --model llava-hf/llava-1.5-7b-hf --data vqa.jsonl --score vqa --limit 2000
    accelerate launch --multi_gpu --num_processes 2 bench/quality/evaluate.py   # each takes its share of the batches

(`--multi_gpu` is what makes accelerate start several processes on one machine; on CPUs they talk through gloo.)

Pruning is the library's own (`tokenprune.patch`); nothing is done here but asking (`answering.py`). At each `keep` the
methods that drop tokens inside the decoder are set to cost it as much (`matching.py`); a method that cannot come down
to that has no row there. A method whose text says how much it keeps (`fastv:layer=2,keep=0.25`) gets one row, as it is.

`resize` is the baseline that prunes nothing: the image itself is made smaller until it has about as many patches. The
embedded model has only ever seen one resolution and one size of digits, so for it the baseline is a low bar; for
models trained on many resolutions it is not. `random` draws anew for every batch.

Any other data: call `evaluate` with an iterable of `data.Sample` (image, question, answer), or see `jsonl.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from answering import Setting, ask, ask_smaller, grid_side, prepare
from data import Sample, by_image, make_dataset
from figure import draw
from intervals import Bootstrap, Outcome, markdown, summarise
from jsonl import read_samples
from matching import Cost, Methods, OutOfReach, Probe, is_fixed, matched
from provenance import provenance
from scoring import SCORES

import tokenprune
from tokenprune.parsing import parse_methods, split_methods
from tokenprune.report.loading import Loaded, load_model, n_visual

log = logging.getLogger("evaluate")
BASELINES = ("random", "uniform", "resize")
USUAL = ",".join([name for name in tokenprune.list_methods() if name not in BASELINES] + [*BASELINES])
IN_DECODER = {"before_llm", "llm_layer", "kv_cache"}


@dataclass(frozen=True)
class Run:
    """One configuration: a row of the table.

    Attributes:
        method: as it was asked for, `dense` or `resize`.
        keep: what it is matched with.
        methods: what the model is patched with; empty for `dense` and `resize`.
        cost: of its prefill on the probe; None where it was not measured.
        side: of the resized image, in patches, where that is how it is done.
    """

    method: str
    keep: float
    methods: Methods = ()
    cost: Cost | None = None
    side: int | None = None


def plan(texts: list[str], keeps: list[float], probe: Probe, side: int | None) -> list[Run]:
    """All configurations, the dense model first.

    Args:
        texts: methods as text, or `resize`.
        keeps: what to compare at; 1 and more stand for the dense model, which is always there.
        probe: what costs are measured on.
        side: patches on a side of the image where the model can be asked about smaller ones directly.
    """
    runs = [Run("dense", 1.0, cost=probe.dense)]
    for keep in sorted({keep for keep in keeps if keep < 1}, reverse=True):
        for text in texts:
            if text == "resize":
                runs.append(_resized(keep, probe, side))
            elif not is_fixed(text):
                try:
                    methods = matched(text, keep, probe)
                except OutOfReach as reason:
                    log.info("%s", reason)
                    continue
                runs.append(Run(text, keep, methods, probe.cost(methods)))
    for text in texts:
        if text != "resize" and is_fixed(text):
            methods = parse_methods(text)
            cost = probe.cost(methods)
            runs.append(Run(text, round(cost.tokens / probe.n_visual, 4), methods, cost))
    return runs


def _resized(keep: float, probe: Probe, side: int | None) -> Run:
    """The baseline; where its tokens are known beforehand, its decoder costs what so many tokens cost."""
    if side is None:
        return Run("resize", keep)
    small = max(1, round(math.sqrt(keep) * side))
    cost = probe.cost(parse_methods("uniform", keep=small * small))
    return Run("resize", keep, cost=replace(cost, prefill_flops_g=None), side=small)


def batches(samples: Iterable[Sample], size: int) -> Iterator[list[tuple[int, Sample]]]:
    """Samples with the numbers of their images, at least `size` at a time; questions about an image stay together."""
    pending: list[tuple[int, Sample]] = []
    for number, group in enumerate(by_image(samples)):
        pending += [(number, sample) for sample in group]
        if len(pending) >= size:
            yield pending
            pending = []
    if pending:
        yield pending


def answers(loaded: Loaded, run: Run, asked: Any, setting: Setting, number: int, share: bool) -> list[float]:
    """How right the answers of one configuration are on batch `number`."""
    if run.method == "resize" and run.side is None:
        return ask_smaller(loaded, asked, setting, keep=run.keep)
    if not run.methods:
        return ask(loaded, asked, setting, share=share, side=run.side)
    methods = [
        replace(one, seed=one.seed + number) if isinstance(one, tokenprune.Random) else one for one in run.methods
    ]
    inside = {site for one in methods for site in one.sites()} <= IN_DECODER
    with tokenprune.patch(loaded.model, methods):
        return ask(loaded, asked, setting, share=share and inside)


def evaluate(
    loaded: Loaded,
    samples: Iterable[Sample],
    *,
    texts: list[str],
    keeps: list[float],
    setting: Setting,
    batch: int = 128,
    share: bool = True,
    processes: tuple[int, int] = (0, 1),
) -> list[dict[str, Any]]:
    """The rows of the table; in every process but the first an empty list.

    Args:
        loaded: a model and its processor.
        samples: anything that yields samples; questions about one image next to each other, as the same object.
        texts: methods as text, or `resize`.
        keeps: what to compare at.
        setting: how answers are taken.
        batch: samples in one forward.
        share: whether one encoding of an image may serve all questions and methods.
        processes: number of this process and of all of them; each takes every so manieth batch.
    """
    rank, world = processes
    runs: list[Run] | None = None
    scores: dict[tuple[int, int], list[float]] = {}
    kinds: dict[int, tuple[list[int], list[str]]] = {}
    for number, pairs in enumerate(_bar(batches(samples, batch), silent=rank > 0)):
        chosen = [sample for _, sample in pairs]
        if runs is None:
            first = prepare(loaded, chosen[:1], setting)
            probe = Probe(loaded.model, first.inputs, n_visual(loaded.model, first.inputs))
            runs = plan(texts, keeps, probe, grid_side(loaded.model))
        if number % world != rank:
            continue
        asked = prepare(loaded, chosen, setting)
        kinds[number] = [image for image, _ in pairs], [sample.type for sample in chosen]
        for place, run in enumerate(list(runs)):
            scores[place, number] = answers(loaded, run, asked, setting, number, share)
    if runs is None:
        raise tokenprune.InputError("there are no samples to evaluate")
    for found in _gathered((scores, kinds), world):
        scores |= found[0]
        kinds |= found[1]
    return [] if rank else _rows(runs, scores, kinds)


def _rows(
    runs: list[Run], scores: dict[tuple[int, int], list[float]], kinds: dict[int, tuple[list[int], list[str]]]
) -> list[dict[str, Any]]:
    order = sorted(kinds)
    dense = runs[0].cost or Cost(1.0, None, 1.0)
    outcomes = []
    for place, run in enumerate(runs):
        right = list(itertools.chain.from_iterable(scores[place, number] for number in order))
        tokens = run.cost.tokens if run.cost else dense.tokens * run.keep
        outcomes.append(Outcome(run.method, run.keep, round(tokens), right))
    images, types = ([value for number in order for value in kinds[number][part]] for part in (0, 1))
    rows = summarise(outcomes, Bootstrap(images, types))
    for row, run in zip(rows, runs, strict=True):
        row["options"] = " + ".join(map(repr, run.methods))
        if run.cost is not None:
            row["decoder_flops_g"] = round(run.cost.decoder_flops_g, 6)
            row["decoder_share"] = round(run.cost.decoder_flops_g / dense.decoder_flops_g, 4)
            spent = run.cost.prefill_flops_g
            row["prefill_flops_g"] = None if spent is None else round(spent, 6)
    return rows


def _bar(items: Iterator[Any], *, silent: bool) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc="batches", disable=True if silent else None, leave=False)


def _gathered(mine: Any, world: int) -> list[Any]:
    """What every process found."""
    if world == 1:
        return [mine]
    from accelerate.utils import gather_object

    return list(gather_object([mine]))


def processes() -> tuple[int, int]:
    """Number of this process and of all of them, as `accelerate launch` or `torchrun` started them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if "ACCELERATE_USE_CPU" in os.environ:
            log.info("one process; accelerate starts several with --multi_gpu --num_processes N, on CPUs too")
        return 0, 1
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demos/model", help="a folder or a name on the hub")
    parser.add_argument("--methods", default=USUAL, help="with commas between; options as in fastv:layer=2,keep=0.25")
    parser.add_argument("--keep", default="1,0.75,0.5,0.25,0.125,0.06", help="with commas between")
    parser.add_argument("--images", type=int, default=500, help="images of the embedded model's task")
    parser.add_argument("--seed", type=int, default=1, help="seed of these images: every seed is another set")
    parser.add_argument("--data", type=Path, help="JSON lines with samples, instead (see jsonl.py)")
    parser.add_argument("--folder", type=Path, help="where the paths of images in --data start (default: beside it)")
    parser.add_argument("--limit", type=int, help="take only so many samples of --data")
    parser.add_argument("--score", choices=sorted(SCORES), help="generate answers and score them so (with --data: vqa)")
    parser.add_argument("--prompt", help="text with {question} in it (default: the model's chat template)")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128, help="samples in one forward")
    parser.add_argument("--encode-each", action="store_true", help="run the vision encoder anew for every question")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, help="JSON file; a Markdown file and a plot are written beside it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit status: 0, or 2 with one line on stderr."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.logging.disable_progress_bar()
    try:
        share = processes()
        score = args.score or ("vqa" if args.data else "")
        setting = Setting(not score, score, args.max_new_tokens, args.prompt)
        samples: Iterable[Sample] = make_dataset("eval", args.images, args.seed)
        if args.data:
            samples = itertools.islice(read_samples(args.data, images=args.folder), args.limit)
        keeps = [float(keep) for keep in args.keep.split(",")]
        rows = evaluate(
            load_model(args.model, device=args.device, dtype=args.dtype),
            samples,
            texts=split_methods(args.methods),
            keeps=keeps,
            setting=setting,
            batch=args.batch,
            share=not args.encode_each,
            processes=share,
        )
    except (tokenprune.TokenPruneError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if rows:
        report(rows, args, share[1])
    return 0


def report(rows: list[dict[str, Any]], args: argparse.Namespace, n_processes: int) -> None:
    """Print the tables and write the files."""
    text = f"Accuracy in percent, 95 % interval from a bootstrap over images:\n\n{markdown(rows)}\n"
    for figure, title in (("minus_dense", "Points against dense"), ("minus_random", "Points against random")):
        text += f"\n{title} (paired):\n\n{markdown(rows, figure)}\n"
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        content = {**provenance(args, n_processes), "rows": rows}
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")
        draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
