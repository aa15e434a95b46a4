"""Budgets on what real processors make: `keep` as a count is of each image and each frame, however it came in.

glm4v, smolvlm and molmo2 take no call with images and videos; perception_lm takes no images that differ in their number
of tiles, and most families no videos that differ in length: transformers itself fails on those.
"""

import copy

import families
import pytest
import torch
from families import Batch, generate
from hybrid import CONFIG
from oracle import kept_of_row, reference_logits
from processors import KINDS, expected, model_of, processed, processor
from upstream import EMBEDS

import tokenprune

SMALL, WIDE, TALL, CLIP = (40, 40), (32, 96), (64, 32), (5, 32, 32)
KEEP = 3

BESIDE = (("w5", SMALL, WIDE, "w6"), ("w5", TALL, "w6", "w7", SMALL), ("w8", "w9"))
SAME = (("w5", SMALL, SMALL, "w6"), ("w7", "w8", SMALL))
CLIPS = (("w5", CLIP, CLIP, "w6"), ("w5", "w7", CLIP))
CLIP_EACH = (("w5", CLIP, "w6"), ("w5", "w7", CLIP))
LENGTHS = (("w5", CLIP, "w6"), ("w5", (3, 32, 32), "w7"))
MIXED = (("w5", SMALL, CLIP, "w6"), ("w6", CLIP, TALL))
ROWS = {f"{family}-images": (family, SAME if family == "perception_lm" else BESIDE) for family in KINDS}
ROWS |= {
    f"{family}-videos": (family, CLIPS)
    for family in ("llava_next_video", "llava_onevision", "video_llava", "perception_lm", "internvl", "smolvlm")
}
ROWS |= {f"{family}-videos": (family, CLIPS) for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")}
ROWS |= {f"{family}-lengths": (family, LENGTHS) for family in ("qwen2_5_vl", "qwen3_vl", "glm4v", "molmo2")}
ROWS |= {"molmo2-videos": ("molmo2", CLIP_EACH)}
ROWS |= {f"{family}-mixed": (family, MIXED) for family in ("llava_onevision", "qwen2_5_vl", "internvl")}


@pytest.fixture(autouse=True)
def hybrid(monkeypatch):
    """The tables of the tests know qwen3_5."""
    monkeypatch.setitem(families.CONFIGS, "qwen3_5", CONFIG)
    monkeypatch.setattr("oracle.MROPE", (*families.MROPE, "qwen3_5"))


def prompt(family, rows, **options):
    inputs = processed(family, rows, **options)
    inputs.pop("labels", None)
    return inputs


def check_counts(trace, counts):
    """Each image of each row keeps `KEEP` of its tokens, or all where it has fewer."""
    assert trace.images == counts, "images or frames were told apart wrongly"
    assert trace.note == ""
    for row, sizes in enumerate(counts):
        kept = torch.isin(trace.visual_indices[row], trace.kept_indices[row]).split(list(sizes)) if sizes else ()
        assert [int(one.sum()) for one in kept] == [min(KEEP, size) for size in sizes]


@pytest.mark.parametrize("name", ROWS)
def test_a_count_is_of_each_image_and_frame(name):
    family, rows = ROWS[name]
    dense = model_of(family)
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, "divprune", keep=KEEP)
    inputs, counts = prompt(family, rows), expected(family, rows)
    if name != "perception_lm-images":  # see below
        generate(model, inputs, 1)
        check_counts(session.traces[0], counts)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    traces = session.traces
    check_counts(traces[0], counts)
    if family == "qwen3_5":  # test_hybrid has an oracle of its own
        return
    row = max(range(len(rows)), key=lambda i: len(counts[i]))
    single = Batch(prompt(family, (rows[row],), seed=100 * row), (0,), ())
    length = single.inputs["input_ids"].shape[1]
    pad = inputs["input_ids"].shape[1] - length
    kept = kept_of_row(traces, row, pad, length)
    torch.testing.assert_close(logits[row], reference_logits(dense, family, single, kept)[-1], atol=1e-4, rtol=1e-4)


OPTIONS = {
    "right-padding": ("idefics3", BESIDE, {"padding_side": "right"}),
    "right-padded-lines": ("mistral3", BESIDE, {"padding_side": "right"}),
    "no-tiles": ("idefics3", BESIDE, {"do_image_splitting": False}),
    "no-crops": ("aya_vision", BESIDE, {"crop_to_patches": False}),
    "no-grid": ("ovis2", BESIDE, {"crop_to_patches": False}),
    "slow": ("qwen2_5_vl", CLIP_EACH, {"fps": 1}),
    "fast": ("qwen2_5_vl", CLIP_EACH, {"fps": 60}),
    "interpolated": ("llava_onevision", (("w5", (128, 128), "w6"), ("w7", TALL)), {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_count_means_the_same_with_every_option(name):
    family, rows, options = OPTIONS[name]
    model, inputs = model_of(family), prompt(family, rows, **options)
    session = tokenprune.patch(model, "divprune", keep=KEEP)
    for run in (lambda: model(**inputs), lambda: generate(model, inputs, 1)):
        with torch.no_grad():
            run()
        check_counts(session.traces[0], expected(family, rows, **options))


@pytest.mark.parametrize(("flag", "value"), [("video_use_col_tokens", True), ("image_use_col_tokens", False)])
def test_lines_of_molmo2_may_be_broken_or_not(flag, value, monkeypatch):
    monkeypatch.setattr(processor("molmo2"), flag, value)
    rows = CLIP_EACH if "video" in flag else BESIDE
    model, inputs = model_of("molmo2"), prompt("molmo2", rows)
    session = tokenprune.patch(model, "divprune", keep=KEEP)
    for run in (lambda: model(**inputs), lambda: generate(model, inputs, 1)):
        with torch.no_grad():
            run()
        check_counts(session.traces[0], expected("molmo2", rows))


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "ovis2", "aya_vision", "molmo2", "mistral3"])
def test_embeddings_in_place_of_ids_tell_as_much(family):
    model, inputs = model_of(family), prompt(family, BESIDE)
    session = tokenprune.patch(model, "divprune", keep=KEEP)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with torch.no_grad():
        model(**{EMBEDS: embeds}, **inputs)
    check_counts(session.traces[0], expected(family, BESIDE))


def test_every_beam_has_the_budgets_of_its_row():
    model, inputs = model_of("idefics3"), prompt("idefics3", BESIDE[:2])
    session = tokenprune.patch(model, "divprune", keep=KEEP)
    generate(model, inputs, 2, num_beams=2)
    check_counts(session.traces[0], tuple(counts for counts in expected("idefics3", BESIDE[:2]) for _ in range(2)))


# --- where it cannot be known -----------------------------------------------------------------------------------------


def test_generate_does_not_hand_on_how_many_images_perception_lm_has_and_the_report_says_so():
    model, inputs = model_of("perception_lm"), prompt("perception_lm", SAME[:1])
    session = tokenprune.patch(model, "divprune", keep=KEEP)
    generate(model, inputs, 1)
    trace = session.traces[0]
    assert trace.images == ((40,),)
    said = "the boundaries of images could not be told: 1 run of visual tokens was taken for 1 image"
    assert trace.note == said
    assert f"before_llm, divprune: {said}." in " ".join(str(session.report()).split())
    assert session.report().to_dict()["sites"][0]["note"] == said


def test_frames_that_neither_grids_nor_positions_tell_count_as_one():
    model, inputs = model_of("qwen2_5_vl"), prompt("qwen2_5_vl", CLIPS[:1])
    session = tokenprune.patch(model, "divprune", keep=KEEP)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    generate(model, {EMBEDS: embeds, **inputs}, 1)
    trace = session.traces[0]
    assert [sum(counts) for counts in trace.images] == [sum(counts) for counts in expected("qwen2_5_vl", CLIPS[:1])]
    assert trace.n_out == (2 * KEEP,)
    assert trace.note.endswith("2 runs of visual tokens were taken for 2 images")


def test_a_chunk_of_a_prompt_may_hold_several_images():
    model, inputs = model_of("llava"), prompt("llava", (("w5", SMALL, SMALL, "w6"),))
    session = tokenprune.patch(model, "divprune", keep=KEEP)
    generate(model, inputs, 1, prefill_chunk_size=inputs["input_ids"].shape[1] - 1)
    noted = [trace for trace in session.traces if trace.status == "applied"]
    assert [trace.images for trace in noted] == [((32,),)]
    assert noted[0].note.endswith("1 run of visual tokens was taken for 1 image")


def test_tiles_whose_tags_are_not_there_count_as_images():
    model, inputs = model_of("idefics3"), prompt("idefics3", (("w5", SMALL, "w6"),))
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.where((ids == families.IMAGE) | (ids < 100), ids, torch.arange(len(ids[0])) % 60 + 20)
    session = tokenprune.patch(model, "divprune", keep=KEEP)
    with torch.no_grad():
        model(**inputs)
    assert session.traces[0].images == ((4,) * 5,)
    assert session.traces[0].note.endswith("5 runs of visual tokens were taken for 5 images")
