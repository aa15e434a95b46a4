"""Accuracy of the small vision transformer against r: `python bench/quality/evaluate_vit.py --model demos/vit`.

Images hold only digits that no training image contains. Pruning is the library's own (`tokenprune.patch`).

`random` drops as many tokens as ToMe merges, in the same places of the same blocks, drawn anew for every image: the
same computation without any choice. `resize` prunes nothing: the image is made smaller (a whole number of patches a
side, interpolated position embeddings) until the blocks see about as many tokens on average. The model has only ever
seen one resolution, so for it that baseline is a low bar.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from intervals import Bootstrap, Outcome, markdown, summarise
from names import flops_g
from scenes import GRID, IMAGE, PATCH, make_scenes
from torch import Tensor, nn
from vit import SCENES, load, normalise

import tokenprune
from tokenprune.reduction import Keep

log = logging.getLogger("evaluate_vit")
BATCH = 250


@dataclass(frozen=True, kw_only=True)
class RandomDrop(tokenprune.ToMe):
    """Drops random patches where ToMe merges the most similar ones."""

    name: ClassVar[str] = "random"
    generator: torch.Generator

    def encoder_block(self, signals, budget) -> Keep:
        """Which `budget.high` tokens stay, the protected ones first."""
        draw = torch.rand(signals.keys.shape[:2], generator=self.generator)
        draw[:, signals.protected] = 2.0
        return Keep(draw.topk(budget.high, dim=1).indices.sort(dim=1).values)


@torch.inference_mode()
def name_digits(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[bool]:
    """Right or wrong for every image, with the model as it is."""
    return [right for pixels, digit in batches for right in (model(pixels).argmax(-1) == digit).tolist()]


def resized(model: nn.Module, tokens: float) -> tuple[nn.Module, int]:
    """A copy for smaller images of about so many patches, and the side of such an image."""
    side = PATCH * max(1, round(tokens**0.5))
    small = copy.deepcopy(model)
    small.set_input_size(img_size=side)
    return small, side


def compare(model: nn.Module, batches: list[tuple[Tensor, Tensor]], r: int) -> list[Outcome]:
    """ToMe and the baselines at one `r`."""
    depth, n = len(model.blocks), GRID * GRID
    removed = tokenprune.ToMe(r=r).removals(n_layers=depth, n_tokens=n)
    left = n - sum(removed)
    # Attention sees what enters a block and the MLP, which costs more, what is left.
    mean = sum(n - sum(removed[: i + 1]) for i in range(depth)) / depth
    outcomes = []
    random = RandomDrop(r=r, generator=torch.Generator().manual_seed(r), proportional=False)
    for method in (tokenprune.ToMe(r=r), random):
        with tokenprune.patch(model, method):
            outcomes.append(Outcome(method.name, left / n, left, name_digits(model, batches)))
    small, side = resized(model, mean)
    shrunk = [
        (nn.functional.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True), digit)
        for pixels, digit in batches
    ]
    outcomes.append(Outcome("resize", left / n, (side // PATCH) ** 2, name_digits(small, shrunk)))
    for outcome in outcomes:
        log.info("r %2d  %-7s %5.1f %%", r, outcome.method, 100 * sum(outcome.right) / len(outcome.right))
    return outcomes


@torch.inference_mode()
def cost(model: nn.Module, pixels: Tensor, r: int) -> float:
    """GFLOP per image."""
    if not r:
        return round(flops_g(lambda: model(pixels)) / len(pixels), 4)
    with tokenprune.patch(model, "tome", r=r):
        return round(flops_g(lambda: model(pixels)) / len(pixels), 4)


def provenance(args: argparse.Namespace) -> dict:
    """What is needed to run the same again."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": f"python bench/quality/evaluate_vit.py --model {args.model} --r {args.r} --images {args.images} "
        f"--seed {args.seed}",
        "commit": None if found.returncode else found.stdout.strip(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "images": args.images,
        "seed": args.seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demos/vit")
    parser.add_argument("--r", default="3,6,9,12,15,17", help="patches removed per block, the values to compare")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1, help="seed of the evaluation images")
    parser.add_argument("--output", type=Path, help="JSON file; a Markdown file is written beside it")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = load(Path(args.model))
    scenes = make_scenes("eval", args.images, torch.Generator().manual_seed(args.seed), SCENES)
    assert scenes.pixels.shape[-1] == IMAGE
    batches = list(zip(normalise(scenes.pixels).split(BATCH), scenes.digit[:, 0].split(BATCH), strict=True))
    outcomes = [Outcome("dense", 1.0, GRID * GRID, name_digits(model, batches))]
    log.info("dense %.1f %%", 100 * sum(outcomes[0].right) / args.images)
    rounds = [int(r) for r in args.r.split(",")]
    for r in rounds:
        outcomes += compare(model, batches, r)
    rows = summarise(outcomes, Bootstrap(range(args.images), ["digit"] * args.images))
    few = batches[0][0][:8]
    for row, r in zip(rows, [0, *(r for r in rounds for _ in range(3))], strict=True):
        row["r"] = r
        if row["method"] != "resize":
            row["gflop_per_image"] = cost(model, few, r)
    text = f"Accuracy in percent, 95 % interval from a bootstrap over images:\n\n{markdown(rows)}\n"
    for figure, title in (("minus_dense", "Points against dense"), ("minus_random", "Points against random")):
        text += f"\n{title} (paired):\n\n{markdown(rows, figure)}\n"
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**provenance(args), "rows": rows}, indent=1) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
