"""The quality lab: what it asks is what greedy decoding would say, costs are matched, files are read whatever is in
them, and two processes find what one finds."""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from test_demo import model  # noqa: F401

import tokenprune

ROOT = Path(__file__).resolve().parents[2]
LAB, EMBEDDED = ROOT / "bench" / "quality", ROOT / "demos" / "model"


@pytest.fixture(scope="module", autouse=True)
def _ready() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(LAB)
        patch.setattr(transformers.logging, "_tqdm_active", False)
        yield


def lab(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def loaded() -> Any:
    from tokenprune.report.loading import load_model

    return load_model(str(EMBEDDED), device="cpu")


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    return list(lab("data").make_dataset("eval", 4, 11))


@pytest.fixture(scope="module")
def asked(loaded: Any, samples: list[Any]) -> Any:
    return lab("answering").prepare(loaded, samples, lab("answering").Setting())


@pytest.fixture(scope="module")
def probe(loaded: Any, samples: list[Any]) -> Any:
    one = lab("answering").prepare(loaded, samples[:1], lab("answering").Setting())
    return lab("matching").Probe(loaded.model, one.inputs, 144)


METHODS = ("", "divprune:keep=0.1", "uniform:keep=20", "fastv:layer=1,keep=0.1", "aim:merge=0.25", "aim:merge=None")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [True, False])
def test_forced_answers_are_what_greedy_decoding_says(
    loaded: Any, samples: list[Any], asked: Any, method: str, share: bool
) -> None:
    answering, setting = lab("answering"), lab("answering").Setting()
    session = tokenprune.patch(loaded.model, list(lab("matching").parse_methods(method))) if method else None
    try:
        found = answering.ask(loaded, asked, setting, share=share)
        longest = asked.expected.shape[1]
        ids = loaded.model.generate(**answering._fresh(asked.inputs), max_new_tokens=longest, **answering.GREEDY)
    finally:
        tokenprune.unpatch(loaded.model)
    said = [lab("answering").decode(loaded, row[asked.inputs["input_ids"].shape[1] :]) for row in ids]
    assert found == [float(words == sample.answer) for words, sample in zip(said, samples, strict=True)]
    assert session is None or session.traces


def test_selection_does_not_see_the_expected_answer(loaded: Any, samples: list[Any]) -> None:
    answering, setting = lab("answering"), lab("answering").Setting()
    kept: list[torch.Tensor] = []
    for answer in ("7", "red", "1 2 3 4 5"):
        changed = answering.prepare(loaded, [sample._replace(answer=answer) for sample in samples], setting)
        with tokenprune.patch(loaded.model, "fastv", layer=1, keep=8) as session, pytest.MonkeyPatch.context() as patch:
            published: list[Any] = []
            patch.setattr(session, "publish", published.append)
            answering.ask(loaded, changed, setting, share=True)
        kept += [torch.stack(trace.kept_indices) for traces in published for trace in traces if trace.kept_indices]
    assert len(kept) == 3
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.06])
@pytest.mark.parametrize(
    "text", ["divprune", "aim", "aim:prune=None", "aim:merge=None", "fastv", "pyramiddrop", "tome", "spatten"]
)
def test_methods_are_set_to_cost_the_decoder_as_much(probe: Any, text: str, keep: float) -> None:
    matching = lab("matching")
    target = probe.cost((tokenprune.Uniform(keep=keep),)).decoder_flops_g
    try:
        cost = probe.cost(matching.matched(text, keep, probe)).decoder_flops_g
    except matching.OutOfReach:
        assert text in ("fastv", "pyramiddrop", "aim:merge=None", "spatten")
        assert keep < 0.5
        return
    assert cost <= matching.SLACK * target
    # One rung of the schedule of AIM alone is a layer's worth of tokens; everything else is set token by token.
    assert cost >= (0.5 if text == "aim:merge=None" else 0.93) * target


def test_cost_is_by_the_formula_and_selection_is_apart(loaded: Any, probe: Any) -> None:
    config, cost = loaded.model.config.text_config, probe.cost((tokenprune.Uniform(keep=36),))
    length = probe.inputs["input_ids"].shape[1] - 144 + 36
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    layer = 2 * length * (4 * width * heads + 3 * width * inner) + 4 * length**2 * heads
    assert cost.decoder_flops_g == pytest.approx(config.num_hidden_layers * layer / 1e9, rel=1e-6)
    assert cost.tokens == 36
    assert probe.cost((tokenprune.DivPrune(keep=36),)).prefill_flops_g > cost.prefill_flops_g


def test_what_says_itself_how_much_it_keeps() -> None:
    fixed = lab("matching").is_fixed
    assert [text for text in METHODS if text and not fixed(text)] == ["aim:merge=None"]
    assert not fixed("fastv:layer=2")
    assert not fixed("aim:prune=None")


def test_rows_of_an_evaluation(loaded: Any, samples: list[Any], tmp_path: Path) -> None:
    evaluate, setting = lab("evaluate"), lab("answering").Setting()
    texts = ["divprune", "fastv", "random", "resize", "fastv:layer=1,keep=0.5"]
    rows = evaluate.evaluate(loaded, samples, texts=texts, keeps=[1.0, 0.5], setting=setting, batch=16)
    assert [(row["method"], row["keep"]) for row in rows[:-1]] == [
        ("dense", 1.0),
        *((name, 0.5) for name in ("divprune", "fastv", "random", "resize")),
    ]
    assert rows[-1]["options"] == "FastV(keep=0.5, layer=1)"
    assert rows[0]["accuracy"]["overall"]["mean"] > 80
    assert rows[4]["tokens"] == 64
    assert all(0.3 < row["decoder_share"] <= 0.65 for row in rows[1:])
    lab("figure").draw(rows, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 1000
    with pytest.raises(tokenprune.InputError, match="no samples"):
        evaluate.evaluate(loaded, [], texts=["divprune"], keeps=[0.5], setting=setting)


def test_random_draws_anew_for_every_batch(loaded: Any, samples: list[Any]) -> None:
    evaluate, setting = lab("evaluate"), lab("answering").Setting()
    run = evaluate.Run("random", 0.1, (tokenprune.Random(keep=0.1, seed=5),))
    asked = lab("answering").prepare(loaded, samples, setting)
    seen = []
    patch = tokenprune.patch
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(
            tokenprune, "patch", lambda model, methods: seen.append(methods[0].seed) or patch(model, methods)
        )
        for number in (0, 1, 7):
            evaluate.answers(loaded, run, asked, setting, number, True)
    assert seen == [5, 6, 12]


def test_another_model_answers_in_its_own_words(model: Path) -> None:  # noqa: F811
    """Any iterable of (image, question, answer), any model: generated, scored, and resized before the processor."""
    from tokenprune.report.loading import load_model

    evaluate, answering, sample = lab("evaluate"), lab("answering"), lab("data").Sample
    asked = (sample(Image.new("RGB", (40, 30), (9 * i, 90, 0)), "what digit is red ?", "0") for i in range(5))
    setting = answering.Setting(forced=False, score="vqa", max_new_tokens=3)
    rows = evaluate.evaluate(
        load_model(str(model), device="cpu"), asked, texts=["divprune", "resize"], keeps=[0.5], setting=setting, batch=2
    )
    assert [row["method"] for row in rows] == ["dense", "divprune", "resize"]
    assert list(rows[0]["accuracy"]) == ["all"]


@pytest.mark.parametrize(
    ("said", "answer", "answers", "exact", "vqa"),
    [
        ("The Red.", "red", (), 1, 1),
        ("two", "2", (), 1, 1),
        ("3.5", "3.5", (), 1, 1),
        ("3", "3.5", (), 0, 0),
        ("red", "blue", ("blue",) * 9 + ("red",), 1, 0.3),
        ("red", "blue", ("blue",) * 6 + ("red",) * 4, 1, 1),
        ("green", "blue", ("blue",) * 6 + ("red",) * 4, 0, 0),
        ("", "blue", (), 0, 0),
    ],
)
def test_scores(said: str, answer: str, answers: tuple[str, ...], exact: float, vqa: float) -> None:
    sample = lab("data").Sample(Image.new("RGB", (1, 1)), "?", answer, "all", answers)
    assert lab("scoring").exact(said, sample) == exact
    assert lab("scoring").vqa(said, sample) == pytest.approx(vqa)
    assert lab("scoring").contains(f"it is {said} .", sample) == (1 if said and exact and not answers else 0)


def test_a_set_is_written_and_read_back(samples: list[Any], tmp_path: Path) -> None:
    path = lab("jsonl").write_samples(samples, tmp_path / "set")
    found = list(lab("jsonl").read_samples(path))
    assert [sample[1:] for sample in found] == [sample[1:] for sample in samples]
    assert [sample.image.tobytes() for sample in found] == [sample.image.tobytes() for sample in samples]
    groups = lab("data").by_image
    assert [len(group) for group in groups(found)] == [len(group) for group in groups(samples)]


def test_seeds_give_fresh_sets() -> None:
    def pixels(seed: int) -> list[bytes]:
        return [sample.image.tobytes() for sample in lab("data").make_dataset("eval", 2, seed)]

    assert pixels(1) == pixels(1)
    assert not set(pixels(1)) & set(pixels(2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


USED = [
    ({"image": "a.png", "question": "q", "answer": "x"}, ("q", "x", "all", ())),
    ({"image_path": "a.png", "text": "q", "label": 3, "category": "c"}, ("q", "3", "c", ())),
    ({"image": ["a.png"], "prompt": " q ", "answers": ["y", "x", "y"]}, ("q", "y", "all", ("y", "x", "y"))),
    ({"file_name": "a.png", "question": "q", "answers": [{"answer": "z"}]}, ("q", "z", "all", ())),
    (
        {"image": "a.png", "conversations": [{"value": "<image>\nq"}, {"value": "x"}, {"value": "r"}]},
        ("q", "x", "all", ()),
    ),
]
SKIPPED = [
    (b"", "empty"),
    (b"   \t", "empty"),
    (b'{"image": "a.png"', "broken JSON"),
    (b"\xff\xfe\x00", "broken JSON"),
    (b"[" * 100000, "broken JSON"),
    (b"[1, 2]", "no object"),
    (b"null", "no object"),
    (b'{"question": "q", "answer": "x"}', "without image"),
    (b'{"image": "a.png", "answer": "x"}', "without question"),
    (b'{"image": "a.png", "question": 7, "answer": "x"}', "without question"),
    (b'{"image": "a.png", "question": "q"}', "without answer"),
    (b'{"image": "a.png", "question": "q", "answers": [null, {}]}', "without answer"),
    (b'{"image": ["a.png", "b.png"], "question": "q", "answer": "x"}', "several images"),
    (b'{"image": "b.png", "question": "q", "answer": "x"}', "missing image"),
    (b'{"image": "a\\u0000.png", "question": "q", "answer": "x"}', "without image"),
    (b'{"image": ".", "question": "q", "answer": "x"}', "unreadable image"),
    (b'{"image": "cut.png", "question": "q", "answer": "x"}', "unreadable image"),
    (b'{"image": "text.png", "question": "q", "answer": "x"}', "unreadable image"),
    (b'{"image": "' + b"n" * 5000 + b'", "question": "q", "answer": "x"}', "unreadable image"),
    (b'{"image": "a.png", "question": "' + b"q" * (1 << 20) + b'", "answer": "x"}', "too long"),
]


def test_lines_are_used_or_skipped_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [json.dumps(row).encode() for row, _ in USED]
    lines = [line for pair in zip(good * 4, [bad for bad, _ in SKIPPED], strict=True) for line in pair]
    path = folder / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))  # a byte order mark, no newline at the end
    skipped: Counter[str] = Counter()
    found = list(lab("jsonl").read_samples(path, skipped=skipped))
    assert [sample[1:] for sample in found] == [wanted for _, wanted in USED] * 4
    assert skipped == Counter(reason for _, reason in SKIPPED)
    assert f"{len(SKIPPED)} of {len(lines)} lines skipped" in caplog.text


def test_huge_images_are_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "q.jsonl"
    path.write_text('{"image": "a.png", "question": "q", "answer": "x"}\n')
    for limit in (30, 20):  # beyond the limit Pillow warns, beyond twice the limit it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(tokenprune.InputError, match=r"no line that can be used.*too large an image"):
            list(lab("jsonl").read_samples(path))


def test_files_of_which_nothing_can_be_used(folder: Path) -> None:
    read = lab("jsonl").read_samples
    (folder / "empty.jsonl").write_text("")
    for path, saying in {
        folder / "none.jsonl": "there is no file",
        folder: "is a folder",
        folder / "empty.jsonl": "it is empty",
        folder / "a.png": "no line that can be used; line 1: broken JSON",
    }.items():
        with pytest.raises(tokenprune.InputError, match=saying):
            list(read(path))


def test_mistakes_on_the_command_line_take_one_line(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for argv, saying in {
        ("--data", str(folder / "none.jsonl")): "there is no file",
        ("--model", "nowhere/at/all"): "there is no model folder",
        ("--keep", "half"): "could not convert",
        ("--images", "1", "--methods", "divprune,,aim"): "single commas",
        ("--images", "1", "--methods", "divprun"): "did you mean 'divprune'",
    }.items():
        assert lab("evaluate").main(["--model", str(EMBEDDED), *argv]) == 2
        err = capsys.readouterr().err
        assert (err.startswith("error: "), err.count("\n")) == (True, 1)
        assert saying in err


def run(*command: str, folder: Path) -> list[dict[str, Any]]:
    argv = ["--model", str(EMBEDDED), "--images", "6", "--batch", "16", "--methods", "divprune,random,fastv"]
    output = folder / "rows.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(LAB / "evaluate.py"), *argv, "--keep", "0.5", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Accuracy in percent") == 1
    content: dict[str, Any] = json.loads(output.read_text())
    assert content["processes"] == (2 if "launch" in command else 1)
    assert output.with_suffix(".png").exists()
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0"]
    assert run(sys.executable, *launch, folder=tmp_path / "two") == run(sys.executable, folder=tmp_path / "one")
