"""Real pixels through the vision encoders: images and videos, in ragged padded batches, against the dense oracle."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import IMAGE, MROPE, PAD, Batch, generate, tiny, twins
from oracle import check_tokens, generated, kept_of_row, reference_logits
from torch import Tensor

import tokenprune

VIDEO = 101
FOUR = (IMAGE,) * 4


@dataclass(frozen=True)
class Case:
    """How one family takes pixels.

    Attributes:
        family: which one.
        token: placeholder id.
        counts: visual tokens of each image (or frame) of an item; they add up to the item's placeholders.
        pixels: makes the keyword arguments for `n` items out of seeds.
        gap: whether text stands between the frames.
        layout: ids of an item, where more than its placeholders.
    """

    family: str
    token: int
    counts: tuple[int, ...]
    pixels: Callable[[list[int]], dict[str, Any]]
    gap: bool = False
    layout: tuple[int, ...] = ()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(seeds: list[int]) -> dict[str, Any]:
    return {"pixel_values": torch.stack([noise(seed, 3, 32, 32) for seed in seeds])}


def tiles(n: int) -> Callable[[list[int]], dict[str, Any]]:
    return lambda seeds: {"pixel_values": torch.cat([noise(seed, n, 3, 32, 32) for seed in seeds])}


def anyres(seeds: list[int]) -> dict[str, Any]:
    pixels = torch.stack([noise(seed, 2, 3, 32, 32) for seed in seeds])
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]] * len(seeds))}


def per_row(seeds: list[int]) -> dict[str, Any]:
    return {"pixel_values": torch.stack([noise(seed, 1, 3, 32, 32) for seed in seeds])}


def sized(seeds: list[int]) -> dict[str, Any]:
    return {**plain(seeds), "image_sizes": torch.tensor([[32, 32]] * len(seeds))}


def patches(seeds: list[int]) -> dict[str, Any]:
    grid = torch.tensor([[1, 4, 6]] * len(seeds))
    return {"pixel_values": torch.cat([noise(seed, 24, 96) for seed in seeds]), "image_grid_thw": grid}


def patch_video(seeds: list[int]) -> dict[str, Any]:
    grid = torch.tensor([[3, 4, 4]] * len(seeds))
    return {"pixel_values_videos": torch.cat([noise(seed, 48, 96) for seed in seeds]), "video_grid_thw": grid}


def frames(n: int) -> Callable[[list[int]], dict[str, Any]]:
    return lambda seeds: {"pixel_values_videos": torch.stack([noise(seed, n, 3, 32, 32) for seed in seeds])}


def fast_video(seeds: list[int]) -> dict[str, Any]:
    return {**patch_video(seeds), "second_per_grid_ts": torch.tensor([0.1] * len(seeds))}


def two(pixels: Callable[[list[int]], dict[str, Any]]) -> Callable[[list[int]], dict[str, Any]]:
    return lambda seeds: pixels([part for seed in seeds for part in (seed, seed + 50)])


def row_tiles(seeds: list[int]) -> dict[str, Any]:
    return {"pixel_values": torch.stack([noise(seed, 2, 3, 32, 32) for seed in seeds])}


def square_frames(seeds: list[int]) -> dict[str, Any]:
    return {"pixel_values_videos": torch.stack([noise(seed, 3, 3, 28, 28) for seed in seeds])}


CASES = {
    "llava": Case("llava", IMAGE, (16,), plain),
    "vipllava": Case("vipllava", IMAGE, (16,), plain),
    "gemma3": Case("gemma3", IMAGE, (4,), plain),
    "paligemma": Case("paligemma", IMAGE, (16,), plain),
    "internvl-two-tiles": Case("internvl", IMAGE, (8,), tiles(2)),
    "llava_next": Case("llava_next", IMAGE, (36,), anyres),
    "llava_onevision": Case("llava_onevision", IMAGE, (36,), anyres),
    "idefics3": Case("idefics3", IMAGE, (4,), per_row),
    "smolvlm": Case("smolvlm", IMAGE, (4,), per_row),
    "mistral3": Case("mistral3", IMAGE, (4,), sized),
    "qwen2_vl": Case("qwen2_vl", IMAGE, (6,), patches),
    "qwen2_5_vl": Case("qwen2_5_vl", IMAGE, (6,), patches),
    "qwen3_vl": Case("qwen3_vl", IMAGE, (6,), patches),
    "glm4v": Case("glm4v", IMAGE, (6,), patches),
    "qwen2_vl-video": Case("qwen2_vl", VIDEO, (4, 4, 4), patch_video),
    "qwen2_5_vl-video": Case("qwen2_5_vl", VIDEO, (4, 4, 4), patch_video),
    "qwen3_vl-video": Case("qwen3_vl", VIDEO, (4, 4, 4), patch_video, gap=True),
    "glm4v-video": Case("glm4v", IMAGE, (4, 4, 4), patch_video, gap=True),
    "video_llava-video": Case("video_llava", VIDEO, (17, 17, 17), frames(3)),
    "perception_lm-video": Case("perception_lm", VIDEO, (4, 4, 4), square_frames),
    "llava_next_video-video": Case("llava_next_video", VIDEO, (4, 4, 4), frames(3)),
    "llava_onevision-video": Case("llava_onevision", VIDEO, (4, 4, 5), frames(3)),
}
# Boundaries that runs of placeholders do not tell: tiles with tags, lines, images side by side, and frames so fast that
# their positions have one time.
HARD = {
    "idefics3-tiles": Case("idefics3", IMAGE, (8,), row_tiles, layout=(102, 106, *FOUR, 102, 103, *FOUR, 102)),
    "smolvlm-tiles": Case("smolvlm", IMAGE, (8,), row_tiles, layout=(102, 106, *FOUR, 102, 103, *FOUR, 102)),
    "aya_vision-tiles": Case("aya_vision", IMAGE, (8,), tiles(2), layout=(102, 106, *FOUR, 105, *FOUR, 103)),
    "ovis2-tiles": Case("ovis2", IMAGE, (32,), tiles(2), layout=(110, *FOUR * 4, 111, *FOUR * 4, 114)),
    "mistral3-lines": Case("mistral3", IMAGE, (4,), sized, layout=(IMAGE, IMAGE, 102, IMAGE, IMAGE, 103)),
    "llava_next-two": Case("llava_next", IMAGE, (36, 36), two(anyres)),
    "llava_onevision-two": Case("llava_onevision", IMAGE, (36, 36), two(anyres)),
    "llava_onevision-two-videos": Case("llava_onevision", VIDEO, (4, 4, 5, 4, 4, 5), two(frames(3))),
    "qwen2_5_vl-fast": Case("qwen2_5_vl", VIDEO, (4, 4, 4), fast_video),
}
ALL = CASES | HARD
TEXTS = ((3, 4), (6, 2), (2, 3))


def pixel_batch(case: Case, rows: tuple[int, ...], *, extra: Tensor | None = None) -> Batch:
    """Left-padded rows of text, one item, text; `rows` are seeds into TEXTS."""
    ids = []
    for row in rows:
        generator = torch.Generator().manual_seed(row)
        before, after = (torch.randint(5, 95, (n,), generator=generator) for n in TEXTS[row])
        item = [torch.full((n,), case.token) for n in case.counts]
        if case.layout:
            item = [torch.tensor(case.layout)]
        if case.gap:
            item = [part for frame in item for part in (torch.tensor([80]), frame)]
        ids.append(torch.cat([before, *item, after]))
    length = max(map(len, ids))
    pads = tuple(length - len(row) for row in ids)
    input_ids = torch.stack([torch.cat([torch.full((pad,), PAD), row]) for pad, row in zip(pads, ids, strict=True)])
    mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long()
    if extra is not None:
        input_ids, mask = torch.cat([input_ids, extra], 1), torch.cat([mask, torch.ones_like(extra)], 1)
    inputs = {"input_ids": input_ids, "attention_mask": mask, **case.pixels([100 + row for row in rows])}
    if case.family in MROPE:
        kind = 2 if "video_grid_thw" in inputs else 1
        inputs["mm_token_type_ids"] = kind * (input_ids == case.token).long()
    if case.family == "gemma3":
        inputs["token_type_ids"] = (input_ids == IMAGE).long()
    if case.family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(input_ids)
        inputs["token_type_ids"][:, length:] = 1
    return Batch(inputs, pads, ())


@pytest.mark.parametrize("name", ALL)
def test_pixels_in_a_ragged_batch_equal_the_dense_run_on_the_kept_tokens(name):
    case = ALL[name]
    dense, model = twins(case.family)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    ragged = pixel_batch(case, (0, 1, 2))
    out = generate(model, ragged.inputs, 3)
    trace = session.traces[0]
    assert trace.status == "applied"
    assert trace.images == (case.counts,) * 3, "images or frames were told apart wrongly"
    assert trace.n_out == (sum(tokenprune.schedule.count(0.5, n) for n in case.counts),) * 3
    for row in range(3):
        single = pixel_batch(case, (row,), extra=generated(out, row, 3))
        kept = kept_of_row(session.traces, row, ragged.pads[row], single.inputs["input_ids"].shape[1])
        check_tokens(out, row, 3, reference_logits(dense, case.family, single, kept))


@pytest.mark.parametrize("name", ALL)
def test_generate_and_forward_tell_the_images_apart_alike(name):
    case = ALL[name]
    model = tiny(case.family)
    session = tokenprune.patch(model, "uniform", keep=0.5)
    inputs = pixel_batch(case, (0, 1)).inputs
    generate(model, inputs, 1)
    generated = session.traces[0]
    with torch.no_grad():
        model(**copy.deepcopy(inputs))
    called = session.traces[0]
    assert called.images == generated.images
    assert called.grids == generated.grids
    assert [row.tolist() for row in called.kept_indices] == [row.tolist() for row in generated.kept_indices]


@pytest.mark.parametrize(
    ("name", "grid"),
    [("llava", (4, 4)), ("gemma3", (2, 2)), ("qwen2_vl", (2, 3)), ("qwen2_vl-video", (2, 2)), ("llava_next", None)],
)
def test_the_trace_knows_the_grid(name, grid):
    case = ALL[name]
    model = tiny(case.family)
    session = tokenprune.patch(model, "uniform", keep=0.5)
    generate(model, pixel_batch(case, (0,)).inputs, 1)
    assert session.traces[0].grids == ((grid,) * len(case.counts),)


def test_neighbouring_images_without_text_between_are_told_apart():
    model = tiny("llava")
    session = tokenprune.patch(model, "divprune", keep=5)
    ids = torch.tensor([[7, *[IMAGE] * 32, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **plain([1, 2])}
    generate(model, inputs, 1)
    assert session.traces[0].images == ((16, 16),)
    with torch.no_grad():
        model(**inputs)
    assert session.traces[0].images == ((16, 16),)
    assert session.traces[0].n_out == (10,)
