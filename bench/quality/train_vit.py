"""Train the small vision transformer from nothing: `python bench/quality/train_vit.py --output demos/vit`.

Stages of a fixed number of steps, seeded, so that a run can be repeated:

1. windows: only the 6x6 patches around the digit (up to one patch off), at their places. Thirty-seven tokens are cheap,
   and digits are learnt much sooner from them than from the whole image.
2. images: the whole image with its clutter.
3. images: the same again from a smaller learning rate.

In all of them the class token learns the digit and, as a help, every patch learns the digit that it is of; the head for
that is thrown away. Nothing is ever dropped or merged in training: the model was not made for any method.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from optimiser import Optimiser
from scenes import BACKGROUND_DIGIT, GRID, PATCH, Scenes, make_scenes
from torch import Tensor, nn
from vit import CLASSES, SCENES, WIDTH, build_model, export, load, normalise

log = logging.getLogger("train_vit")
WINDOW = 6


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Which tokens the model sees: windows or images.
        steps: Optimiser steps.
        batch: Images per step.
        dense: Weight of the patch labels.
        lr: Peak learning rate of the matrices; everything else gets a tenth.
    """

    name: str
    steps: int
    batch: int
    dense: float = 0.5
    lr: float = 0.02


STAGES = (
    Stage("windows", steps=500, batch=128),
    Stage("images", steps=650, batch=48),
    Stage("images", steps=400, batch=48, lr=0.008),
)


class Trainee(nn.Module):
    """The model with the head that only training uses."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.layers = vit.blocks  # The name by which the optimiser knows matrices.
        self.vit = vit
        self.patch_head = nn.Linear(WIDTH, BACKGROUND_DIGIT + 1)
        for block in vit.blocks:
            block.attn.fused_attn = False  # On a CPU its backward is much slower than plain attention's.

    def forward(self, pixels: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, 96, 96] and the patches [B, n] to look at -> logits [B, 10] and [B, n, 11]."""
        vit = self.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
        if place is not None:
            index = F.pad(place + 1, (1, 0))[..., None].expand(-1, -1, WIDTH)
            x = x.gather(1, index)
        x = vit.norm(vit.blocks(x))
        return vit.forward_head(x), self.patch_head(x[:, 1:])


def windows(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Places [B, 36] of the patches in a window around every digit."""
    first = ((scenes.centre[:, 0] - WINDOW * PATCH / 2) / PATCH).round().long()
    corner = (first + torch.randint(-1, 2, first.shape, generator=generator)).clamp(0, GRID - WINDOW)
    axis = torch.arange(WINDOW)
    rows = (corner[:, 1, None] + axis)[:, :, None] * GRID
    return (rows + (corner[:, 0, None] + axis)[:, None]).flatten(1)


def loss_of(trainee: Trainee, stage: Stage, generator: torch.Generator) -> tuple[Tensor, float]:
    """The loss of new images and the share of them that is named right."""
    scenes = make_scenes("train", stage.batch, generator, SCENES)
    place = windows(scenes, generator) if stage.name == "windows" else None
    with torch.autocast("cpu", torch.bfloat16):
        logits, dense = trainee(normalise(scenes.pixels), place)
    target = scenes.digit[:, 0]
    label = scenes.patch_digit if place is None else scenes.patch_digit.gather(1, place)
    weight = torch.ones(BACKGROUND_DIGIT + 1)
    weight[BACKGROUND_DIGIT] = 0.3
    help_ = F.cross_entropy(dense.float().flatten(0, 1), label.flatten(), weight=weight, label_smoothing=0.02)
    loss = F.cross_entropy(logits.float(), target, label_smoothing=0.05) + stage.dense * help_
    return loss, (logits.argmax(-1) == target).float().mean().item()


@torch.inference_mode()
def held_out(vit: nn.Module, n: int = 500) -> float:
    """Accuracy on images of digits that are in no training image."""
    scenes = make_scenes("eval", n, torch.Generator().manual_seed(1), SCENES)
    vit.eval()
    right = torch.cat([vit(normalise(pixels)).argmax(-1) for pixels in scenes.pixels.split(100)]) == scenes.digit[:, 0]
    vit.train()
    return right.float().mean().item()


def run_stage(trainee: Trainee, number: int, stage: Stage, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(1000 * args.seed + number)
    steps = max(1, round(stage.steps * args.scale))
    optimiser = Optimiser(
        [(trainee, 1.0)], steps, lr_muon=stage.lr, lr_adam=stage.lr / 10, warmup=max(1, min(100, steps // 5))
    )
    mean_loss, mean_right, start = 3.0, 1 / CLASSES, time.perf_counter()
    for step in range(steps):
        loss, right = loss_of(trainee, stage, generator)
        loss.backward()
        optimiser.step(step)
        mean_loss, mean_right = 0.95 * mean_loss + 0.05 * loss.item(), 0.95 * mean_right + 0.05 * right
        if step % 50 == 49 or step + 1 == steps:
            rate = (step + 1) * stage.batch / (time.perf_counter() - start)
            shown = stage.name, step + 1, steps, mean_loss, 100 * mean_right, rate
            log.info("%-7s step %4d/%d  loss %.3f  right %.1f %%  (%.0f/s)", *shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=1, help="first stage to run; weights come from --output")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every stage's steps, for a quick try")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(args.seed)
    trainee = Trainee(build_model() if args.start == 1 else load(args.output).train())
    for number, stage in enumerate(STAGES[args.start - 1 :], args.start):
        run_stage(trainee, number, stage, args)
        export(trainee.vit, args.output)
        log.info("held-out digits: %.1f %%", 100 * held_out(trainee.vit))


if __name__ == "__main__":
    main()
