"""The embedded vision transformer: it is loaded by timm alone, reads digits it has never seen, and stands merging."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenprune

timm = pytest.importorskip("timm")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]
LAB, EMBEDDED = ROOT / "bench" / "quality", ROOT / "demos" / "vit"


@pytest.fixture(scope="module", autouse=True)
def _ready() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(LAB)
        yield


def lab(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def model() -> Any:
    return timm.create_model(f"local-dir:{EMBEDDED}", pretrained=True).float().eval()


@pytest.fixture(scope="module")
def batches() -> Any:
    vit = lab("vit")
    scenes = lab("scenes").make_scenes("eval", 200, torch.Generator().manual_seed(3), vit.SCENES)
    return [(vit.normalise(scenes.pixels), scenes.digit[:, 0])]


def test_merging_costs_little_and_random_dropping_much(model: Any, batches: Any) -> None:
    evaluate = lab("evaluate_vit")
    dense = sum(evaluate.name_digits(model, batches))
    tome, random, resize = evaluate.compare(model, batches, r=9)
    assert dense >= 180
    assert sum(tome.right) >= dense - 6
    assert sum(random.right) < dense - 10
    assert (tome.tokens, random.tokens, resize.tokens) == (72, 72, 100)
    assert sum(evaluate.name_digits(model, batches)) == dense


def test_the_baseline_drops_what_tome_merges(model: Any, batches: Any) -> None:
    evaluate = lab("evaluate_vit")
    random = evaluate.RandomDrop(r=9, generator=torch.Generator().manual_seed(0), proportional=False)
    counts = []
    for method in (tokenprune.ToMe(r=9), random):
        with tokenprune.patch(model, method) as session, torch.inference_mode():
            model(batches[0][0][:3])
            counts.append([(trace.layer, trace.n_out) for trace in session.traces])
    assert counts[0] == counts[1]
    assert counts[0][-1] == (7, (72, 72, 72))


def test_windows_cover_the_digit() -> None:
    train, vit = lab("train_vit"), lab("vit")
    generator = torch.Generator().manual_seed(0)
    scenes = lab("scenes").make_scenes("train", 40, generator, vit.SCENES)
    place = train.windows(scenes, generator)
    assert place.shape == (40, 36)
    labels = scenes.patch_digit != lab("scenes").BACKGROUND_DIGIT
    assert labels.gather(1, place).sum() >= 0.95 * labels.sum()


def test_an_exported_model_is_read_back(tmp_path: Path) -> None:
    vit = lab("vit")
    torch.manual_seed(0)
    model, x = vit.build_model().eval(), torch.randn(2, 3, 96, 96)
    vit.export(model, tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(vit.load(tmp_path)(x), model(x), atol=1e-2, rtol=0)
