"""Train the embedded model from nothing: `python bench/quality/train.py --output demos/model`.

Stages of a fixed number of steps, seeded, so that a run can be repeated:

1. windows: the vision layers alone, on 4x4-patch windows around digits, with labels for every patch. Sixteen
   tokens are cheap, and a digit is learnt much sooner from them than from the whole image.
2. images: the vision layers on whole images; the class token learns which digits and colours are present.
3. answers: the language model learns to answer, with the vision layers frozen and the scenes simple at first.
4. answers: everything together at the full difficulty; the patch labels fade, because they favour pruning by diversity.
5. answers: six of ten images lose random visual tokens. Until then the model has never seen a pruned image, and seems
   to count digits (and end lists) by the share of digit patches, which any method that removes background changes; this
   stage teaches it to expect pruning. The model card has figures with and without it.
6. answers: the same for longer, from a high learning rate again: listing and asking by place gain most.
7. answers: the same, but the vision layers learn along and most questions are about places: where a few patches of a
   digit are left, each of them has to tell where its digit stands.
8. answers: the same with up to nine in ten patches of a digit hidden instead of six.
9. answers: the same once more, from a lower learning rate.
10. answers: the same, for longer.
11. answers: the same, with most questions about lists.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from data import training_batch
from export import export
from network import PIXEL_MEAN, PIXEL_STD, Trainee, build_model
from optimiser import Optimiser, Team
from packing import Packed
from questions import EOS, IGNORE, LISTS_MIX, PLACES_MIX, TRAINING_MIX, WORD_ID, Kind
from scenes import BACKGROUND_DIGIT, COLOURS, GRID, PATCH, SceneConfig, Scenes, make_scenes
from torch import Tensor

log = logging.getLogger("train")
WINDOW = 4


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Which loss is used: windows, images or answers.
        steps: Optimiser steps.
        batch: Images per step (windows in the first stage).
        lr: Peak learning rate of the matrices; everything else gets a tenth.
        vision: Factor on the vision layers' learning rate.
        dense: Weight of the patch labels at the start and at the end.
        ramp: Share of the stage over which scenes grow from easy to full difficulty.
        mix: Kinds of the questions about an image.
        drop: Share of the images that lose a random part of their visual tokens, see `drop_tokens`.
        drop_digits: Largest share of the patches of digits that they lose.
    """

    name: str
    steps: int
    batch: int
    lr: float = 0.02
    vision: float = 1.0
    dense: tuple[float, float] = (1.0, 1.0)
    ramp: float = 0.0
    mix: tuple[Kind, ...] = TRAINING_MIX * 2
    drop: float = 0.0
    drop_digits: float = 0.6


PLACES = Stage("answers", steps=400, batch=32, lr=0.008, vision=0.3, dense=(0.0, 0.0), mix=PLACES_MIX, drop=0.6)
STAGES = (
    Stage("windows", steps=900, batch=512),
    Stage("images", steps=500, batch=48),
    Stage("answers", steps=500, batch=32, vision=0.0, ramp=0.4),
    Stage("answers", steps=1100, batch=32, vision=0.2, dense=(0.3, 0.02)),
    Stage("answers", steps=550, batch=32, lr=0.015, vision=0.0, drop=0.6),
    Stage("answers", steps=1400, batch=32, lr=0.015, vision=0.0, drop=0.6),
    PLACES,
    replace(PLACES, steps=600, lr=0.01, drop=0.7, drop_digits=0.9),
    replace(PLACES, steps=450, lr=0.006, drop=0.7, drop_digits=0.9),
    replace(PLACES, steps=750, lr=0.008, drop=0.7, drop_digits=0.9),
    replace(PLACES, steps=800, lr=0.006, drop=0.7, drop_digits=0.9, mix=LISTS_MIX),
)


def difficulty(stage: Stage, step: int) -> SceneConfig:
    """Scenes for a step: fewer digits and distractors at the beginning of a ramp."""
    share = min(1.0, step / (stage.ramp * stage.steps)) if stage.ramp else 1.0
    if stage.name == "windows":
        return SceneConfig(digits=(5, 5))
    return SceneConfig(digits=(2, 3 + round(2 * share)), fragments=round(6 * share))


def normalise(pixels: Tensor) -> Tensor:
    return (pixels - PIXEL_MEAN) / PIXEL_STD


def cut_windows(scenes: Scenes, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`n` windows of 4x4 patches, two per digit (one up to a patch off): pixels, places and the patches' labels."""
    patches = F.unfold(normalise(scenes.pixels), PATCH, stride=PATCH).transpose(1, 2)
    first = ((scenes.centre - WINDOW * PATCH / 2) / PATCH).round().long()
    shift = torch.randint(-1, 2, first.shape, generator=generator)
    corner = torch.cat((first, first + shift), 1).clamp(0, GRID - WINDOW)
    row, slot = torch.nonzero(torch.cat((scenes.present, scenes.present), 1), as_tuple=True)
    chosen = torch.randperm(len(row), generator=generator)[torch.arange(n) % len(row)]
    row, slot = row[chosen], slot[chosen]
    axis = torch.arange(WINDOW)
    x, y = corner[row, slot].unbind(-1)
    place = ((y[:, None] + axis)[:, :, None] * GRID + (x[:, None] + axis)[:, None]).flatten(1)
    at = row[:, None]
    return patches[at, place], place, scenes.patch_digit[at, place], scenes.patch_colour[at, place]


def dense_loss(trainee: Trainee, hidden: Tensor, digit: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the patch labels, and the share of digit patches whose digit is right."""
    logits = trainee.digit_head(hidden).flatten(0, 1)
    digit = digit.flatten()
    weight = torch.ones(BACKGROUND_DIGIT + 1)
    weight[BACKGROUND_DIGIT] = 0.3
    loss = F.cross_entropy(logits, digit, weight=weight, label_smoothing=0.02)
    loss = loss + F.cross_entropy(trainee.colour_head(hidden).flatten(0, 1), colour.flatten())
    seen = digit != BACKGROUND_DIGIT
    return loss, (logits.argmax(-1) == digit)[seen].float().mean()


def class_loss(trainee: Trainee, hidden: Tensor, scenes: Scenes) -> Tensor:
    """Multi-label loss of the class token: which digits and which colours are in the image."""
    target = torch.zeros(len(hidden), BACKGROUND_DIGIT + len(COLOURS) + 1)
    target.scatter_(1, scenes.digit.where(scenes.present, target.shape[1] - 1), 1)
    target.scatter_(1, (scenes.colour + BACKGROUND_DIGIT).where(scenes.present, target.shape[1] - 1), 1)
    return F.binary_cross_entropy_with_logits(trainee.class_head(hidden[:, 0]), target[:, :-1])


def windows_loss(trainee: Trainee, stage: Stage, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
    scenes = make_scenes("train", stage.batch // 8, generator, difficulty(stage, step))
    patches, place, digit, colour = cut_windows(scenes, stage.batch, generator)
    loss, right = dense_loss(trainee, trainee.windows(patches, place), digit, colour)
    return loss, {"digit": right}


def images_loss(trainee: Trainee, stage: Stage, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
    scenes = make_scenes("train", stage.batch, generator, difficulty(stage, step))
    hidden = trainee.images(normalise(scenes.pixels))
    loss, right = dense_loss(trainee, hidden[:, 1:], scenes.patch_digit, scenes.patch_colour)
    present = class_loss(trainee, hidden, scenes)
    return loss + present, {"digit": right, "class": present}


def drop_tokens(packed: Packed, scenes: Scenes, stage: Stage, generator: torch.Generator) -> Packed:
    """Hide random visual tokens of a share of the images from the questions; positions stay.

    How many background patches go is drawn per image from none to all, of digit patches from none to
    `stage.drop_digits`: the share of digit patches no longer tells how many digits there are.
    """
    n = len(scenes.digit)
    hit = torch.rand(n, 1, generator=generator) < stage.drop
    background, digit = torch.rand(2, n, 1, generator=generator)
    rate = torch.where(scenes.patch_digit == BACKGROUND_DIGIT, background, stage.drop_digits * digit)
    gone = hit & (torch.rand(scenes.patch_digit.shape, generator=generator) < rate)
    bias = packed.bias.repeat(n, 1, 1, 1)
    keys = bias[:, 0, :, : gone.shape[1]]
    keys.masked_fill_(gone[:, None], -torch.inf)
    keys.diagonal(dim1=1, dim2=2).zero_()  # a hidden token may look at itself, for want of anything else
    return replace(packed, bias=bias)


def answers_loss(trainee: Trainee, stage: Stage, step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
    scenes, packed = training_batch(stage.batch, generator, difficulty(stage, step), stage.mix)
    with torch.set_grad_enabled(stage.vision > 0):
        hidden = trainee.images(normalise(scenes.pixels))
    if stage.drop:
        packed = drop_tokens(packed, scenes, stage, generator)
    logits = trainee.answers(hidden, packed)
    loss = F.cross_entropy(logits.flatten(0, 1), packed.target.flatten(), ignore_index=IGNORE)
    asked = (packed.target != IGNORE) & (packed.target != WORD_ID[EOS])
    figures = {"answer": loss, "right": (logits.argmax(-1) == packed.target)[asked].float().mean()}
    if stage.vision:
        dense, figures["digit"] = dense_loss(trainee, hidden[:, 1:], scenes.patch_digit, scenes.patch_colour)
        start, end = stage.dense
        weight = start + (end - start) * step / stage.steps
        loss = loss + weight * (dense + class_loss(trainee, hidden, scenes))
    return loss, figures


LOSSES: dict[str, Callable[..., tuple[Tensor, dict]]] = {
    "windows": windows_loss,
    "images": images_loss,
    "answers": answers_loss,
}


def optimiser_for(trainee: Trainee, stage: Stage) -> Optimiser:
    inner = trainee.llava.model
    reads = float(stage.name == "answers")
    modules = [
        (inner.vision_tower, stage.vision),
        (inner.multi_modal_projector, reads),
        (inner.language_model, reads),
        (trainee.llava.lm_head, reads),
        *((head, stage.vision) for head in (trainee.digit_head, trainee.colour_head, trainee.class_head)),
    ]
    return Optimiser(modules, stage.steps, lr_muon=stage.lr, lr_adam=stage.lr / 10, warmup=min(100, stage.steps // 5))


def run_stage(trainee: Trainee, number: int, stage: Stage, team: Team, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(1000 * args.seed + 10 * number + team.rank)
    optimiser = optimiser_for(trainee, stage)
    mean: dict[str, float] = {}
    start = time.perf_counter()
    share = replace(stage, batch=stage.batch // team.size)
    for step in range(stage.steps):
        loss, figures = LOSSES[stage.name](trainee, share, step, generator)
        loss.backward()
        team.average([p.grad for p in optimiser.parameters if p.grad is not None])
        optimiser.step(step)
        for name, value in figures.items():
            mean[name] = 0.95 * mean.get(name, value.item()) + 0.05 * value.item()
        if step % 50 == 49 and team.rank == 0:
            rate = (step + 1) * stage.batch / (time.perf_counter() - start)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in mean.items())
            log.info("stage %d %-8s step %5d/%d  %s  (%.0f/s)", number, stage.name, step + 1, stage.steps, shown, rate)
        if args.checkpoints and team.rank == 0 and (step % 100 == 99 or step + 1 == stage.steps):
            torch.save(trainee.state_dict(), args.checkpoints / f"stage{number}.pt")


def work(rank: int, meeting: str, args: argparse.Namespace) -> None:
    """Run the stages as one process of the team."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    team = Team(rank, args.processes, meeting)
    torch.manual_seed(args.seed)
    trainee = Trainee(build_model())
    if args.start > 1:
        trainee.load_state_dict(torch.load(args.checkpoints / f"stage{args.start - 1}.pt"))
    trainee.compile_layers()
    for number, stage in enumerate(STAGES, 1):
        if number >= args.start:
            run_stage(trainee, number, replace(stage, steps=max(1, round(stage.steps * args.scale))), team, args)
            if rank == 0:
                export(trainee.llava, args.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each that share every batch")
    parser.add_argument("--checkpoints", type=Path, help="folder for the weights after every stage")
    parser.add_argument("--start", type=int, default=1, help="first stage to run; weights come from --checkpoints")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every stage's steps, for a quick try")
    args = parser.parse_args()
    if args.checkpoints:
        args.checkpoints.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"file://{folder}/meeting", args), nprocs=args.processes)


if __name__ == "__main__":
    main()
