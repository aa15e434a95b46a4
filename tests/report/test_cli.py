"""The command line: what it prints is what the library says, and every mistake gets one line and exit status 2."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

import tokenprune
from tokenprune.cli import main

ROOT = Path(__file__).resolve().parents[2]
MODEL, IMAGE = str(ROOT / "demos" / "model"), str(ROOT / "demos" / "assets" / "digits.png")
ASKED = ("--model", MODEL, "--image", IMAGE, "--max-new-tokens", "3", "--repeats", "1")
QUESTION = ("--question", "what digit is leftmost ?")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command line in an empty folder; returns the exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.logging, "_tqdm_active", False)
    level = transformers.logging.get_verbosity()

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            return main([str(part) for part in argv]), *capsys.readouterr()
        finally:
            transformers.logging.set_verbosity(level)

    return call


def test_report_says_what_was_pruned_and_what_it_cost(run: Run) -> None:
    status, out, err = run("report", *ASKED, *QUESTION, "--method", "divprune", "--keep", "0.25")
    assert (status, err) == (0, "")
    for part in ("DivPrune(keep=0.25)", "visual_tokens", "first_token_latency_ms", "Break-even", "KV MiB", MODEL):
        assert part in out


def test_report_as_json_is_nothing_but_json(run: Run) -> None:
    status, out, err = run("report", *ASKED, *QUESTION, "--method", "uniform:keep=36", "--json")
    assert (status, err) == (0, "")
    data = json.loads(out)
    assert data["methods"] == ["Uniform(keep=36)"]
    assert {cost["name"]: cost["pruned"] for cost in data["costs"]}["visual_tokens"] == 36
    assert data["setting"]["repeats"] == 1


def test_several_methods_follow_each_other(run: Run) -> None:
    status, out, _ = run("report", *ASKED, *QUESTION, "--method", "uniform:keep=0.5+divprune:keep=9", "--json")
    assert status == 0
    assert [site["n_out"] for site in json.loads(out)["sites"]] == [[72], [9]]


def test_a_keep_goes_to_the_methods_that_have_one(run: Run) -> None:
    for beside in ("tome:r=2", "aim"):
        status, out, _ = run("report", *ASKED, *QUESTION, "--method", f"divprune+{beside}", "--keep", "0.5", "--json")
        assert status == 0
        assert "DivPrune(keep=0.5)" in json.loads(out)["methods"]


def test_compare_puts_methods_side_by_side(run: Run) -> None:
    methods = ("--methods", "uniform,random,resize", "--keep", "0.5,16", "--plot", "plot.png")
    status, out, err = run("compare", *ASKED, *QUESTION, "--answer", "0", *methods, "--json")
    assert (status, err) == (0, "")
    data = json.loads(out)
    rows = {(row["method"], row["keep"]): row for row in data["rows"]}
    assert next(iter(rows)) == ("dense", 1.0)
    tokens = {key: row["visual_tokens"] for key, row in rows.items()}
    assert [tokens["uniform", 0.5], tokens["uniform", 16], tokens["random", 16]] == [72, 16, 16]
    assert [tokens["dense", 1.0], tokens["resize", 0.5], tokens["resize", 16]] == [144, 64, 16]
    cost = {key: row["prefill_share"] for key, row in rows.items()}
    assert cost["dense", 1.0] == 1 > cost["uniform", 0.5] > cost["uniform", 16] == cost["resize", 16] > 16 / 144
    dense = rows["dense", 1.0]
    assert (dense["agreement"], dense["same_answers"], dense["accuracy"], dense["first_token_kl"]) == (1, 1, 1, 0)
    assert dense["answers"] == ["0"]
    assert rows["uniform", 16]["first_token_kl"] > 0
    assert rows["uniform", 16]["kv_mib"] == rows["resize", 16]["kv_mib"] < dense["kv_mib"]
    assert Path("plot.png").stat().st_size > 10_000


def test_compare_shows_a_method_that_sets_how_much_is_left_once(run: Run) -> None:
    methods = "divprune:keep=0.25,aim:merge=0.5,prune=None,divprune+aim:merge=36,prune=None,tome:r=[9,9,9,9]"
    status, out, _ = run("compare", *ASKED, *QUESTION, "--methods", methods, "--keep", "0.5,0.375", "--json")
    assert status == 0
    found = json.loads(out)
    assert [(row["method"], row["keep"], row["visual_tokens"]) for row in found["rows"][1:]] == [
        ("divprune:keep=0.25", None, 36),
        ("aim:merge=0.5,prune=None", None, 72),
        ("divprune+aim:merge=36,prune=None", 0.5, 36),
        ("divprune+aim:merge=36,prune=None", 0.375, 36),
        ("tome:r=[9,9,9,9]", None, 108),
    ]
    assert "divprune:keep=0.25: its own options say how much is kept, so it has one row, at that cost" in found["notes"]
    fails(run, "compare", *ASKED, "--methods", "aim", "--keep", "1.5", saying="must lie in (0, 1]")


def test_a_comparison_is_as_wide_as_a_terminal_and_has_a_line_for_each_candidate(run: Run) -> None:
    methods = "random:seed=1,aim:merge=0.5,importance=last_query,aim:merge=0.5,importance=column_sum"
    status, out, _ = run("compare", *ASKED, *QUESTION, "--methods", methods, "--keep", "0.25")
    assert status == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 110
    start = next(place for place, line in enumerate(lines) if line.startswith("method"))
    assert [line.split()[0] for line in lines[start : start + 7]] == [
        *("method", "dense", "random:seed=1"),
        *("aim:merge=0.5,", "importance=last_query", "aim:merge=0.5,", "importance=column_sum"),
    ]


def test_resize_that_cannot_be_done_is_told_and_the_rest_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.report.loading.interpolators", lambda model: [])
    status, out, _ = run("compare", *ASKED, *QUESTION, "--methods", "uniform,resize", "--keep", "0.25")
    assert status == 0
    assert "resize: " in out
    assert "turns images of every size into about 144 visual tokens" in " ".join(out.split())


def test_a_method_that_the_model_refuses_is_told_and_the_rest_goes_on(run: Run) -> None:
    status, out, _ = run("compare", *ASKED, *QUESTION, "--methods", "fastv:layer=9,uniform", "--keep", "0.5", "--json")
    found = json.loads(out)
    assert status == 0
    assert [row["method"] for row in found["rows"]] == ["dense", "uniform"]
    assert any("decoder of 4 layers" in note for note in found["notes"])
    fails(run, "compare", *ASKED, *QUESTION, "--methods", "fastv:layer=9", saying="decoder of 4 layers")


def test_methods_and_families_are_listed(run: Run) -> None:
    for command, names in (("methods", tokenprune.list_methods()), ("families", tokenprune.list_families())):
        status, out, err = run(command)
        assert (status, err) == (0, "")
        starts = {line.split()[0].rstrip(":") for line in out.splitlines() if not line.startswith(" ")}
        assert starts == set(names)
        data = json.loads(run(command, "--json")[1])
        found = data if command == "methods" else data["supported"]
        assert {entry["name"] for entry in found} == set(names)


def fails(run: Run, *argv: object, saying: str) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert saying in err, err


@pytest.mark.parametrize(
    ("argv", "saying"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("prune",), "invalid choice: 'prune'"),
        (("report", "--model", MODEL), "--image"),
        (("report", *ASKED, "--keep", "much"), "0.25 or a number of tokens such as 64, got 'much'"),
        (("report", *ASKED, "--keep", "auto"), "divprune:keep=auto,radius=0.05"),
        (("report", *ASKED, "--keep", "1.5"), "must lie in (0, 1]"),
        (("report", *ASKED, "--keep", "0"), "at least 1"),
        (("report", *ASKED, "--method", "divprun"), "did you mean 'divprune'?"),
        (("report", *ASKED, "--method", "random:sed=1"), "no option 'sed'"),
        (("report", *ASKED, "--repeats", "0"), "at least 1, got '0'"),
        (("report", *ASKED, "--max-new-tokens", "-3"), "at least 1, got '-3'"),
        (("report", *ASKED, "--question", " "), "must not be empty"),
        (("report", *ASKED, "--question", "a <image> b"), "must not hold <image>"),
        (("report", *ASKED, "--plot", "plot.docx"), "a file that ends in"),
        (("report", *ASKED, "--plot", "nowhere/plot.png"), "there is no folder nowhere"),
        (("report", "--model", "./nowhere", "--image", IMAGE), "there is no model folder ./nowhere"),
        (("report", "--model", IMAGE, "--image", IMAGE), "is a file; a model is a folder"),
        (("report", "--model", "", "--image", IMAGE), "there is no model folder ''"),
        (("report", "--model", MODEL, "--image", "nowhere.png"), "there is no file nowhere.png"),
        (("report", "--model", MODEL, "--image", MODEL), "is a folder, not an image"),
        (("report", *ASKED, "--device", "tpu"), "invalid choice: 'tpu'"),
        (("report", *ASKED, "--method", "aim", "--keep", "0.5"), "keep=0.5 was given beside 'aim'"),
        (("compare", *ASKED, "--methods", "random,nothing"), "unknown method 'nothing'"),
        (("compare", *ASKED, "--methods", ""), "methods are written with single commas between"),
        (("compare", *ASKED, "--keep", "0.5,"), "got ''"),
        (("compare", *ASKED, "--methods", "random", "--keep", "0.5,2.5"), "must lie in (0, 1], got 2.5"),
        (("compare", *ASKED, *QUESTION, *QUESTION, "--answer", "0"), "2 questions and 1 answers"),
    ],
)
def test_every_mistake_gets_one_line(run: Run, argv: tuple[str, ...], saying: str) -> None:
    fails(run, *argv, saying=saying)


def test_a_broken_image_and_a_broken_model_get_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(Path(IMAGE).read_bytes()[:200])
    fails(run, "report", "--model", MODEL, "--image", "broken.png", saying="broken.png")
    (tmp_path / "empty").mkdir()
    fails(run, "report", "--model", "empty", "--image", IMAGE, saying="the model empty cannot be loaded")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "gpt2"}')
    fails(run, "report", "--model", "text", "--image", IMAGE, saying="does not turn images and text into text")


def test_memory_that_does_not_suffice_gets_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise import_module("torch").OutOfMemoryError("no room")

    monkeypatch.setattr("tokenprune.report.loading.load_model", fail)
    fails(run, "report", *ASKED, saying="does not fit")


def test_help_says_what_there_is_and_what_holds_if_nothing_is_said(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    says = {
        (): ("Prune the visual tokens", "list the methods with their options", "--version"),
        ("report",): ("(default: 5)", "1 is one token, 1.0 is all", "(default: divprune)"),
        ("compare",): ("(default: 3)", "(default: divprune,random,uniform,resize)", "the image itself made smaller"),
    }
    for command, parts in says.items():
        with pytest.raises(SystemExit, match="0"):
            run(*command, "--help")
        told = " ".join(capsys.readouterr().out.split())
        assert [part for part in parts if part not in told] == []
        assert "prints" not in told
    with pytest.raises(SystemExit, match="0"):
        run("--version")
    assert capsys.readouterr().out == f"tokenprune {tokenprune.__version__}\n"


def test_words_that_the_model_does_not_know_are_told_on_stderr(run: Run) -> None:
    status, out, err = run("report", *ASKED, "--question", "Is the WHALE red?", "--json")
    assert status == 0
    assert json.loads(out)
    assert err == "note: the model does not know 1 of the words in 'Is the WHALE red?'\n"


def test_the_module_runs_and_the_script_is_declared() -> None:
    done = subprocess.run([sys.executable, "-m", "tokenprune", "methods"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split(":")[0] in tokenprune.list_methods()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["tokenprune"].partition(":")
    assert getattr(import_module(module), function) is main


def test_an_image_of_any_mode_can_be_asked_about(run: Run, tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGBA", "CMYK", "I;16", "F"):
        path = tmp_path / f"{mode.replace(';', '')}.tiff"
        Image.new(mode, (40, 30)).save(path)
        assert run("report", "--model", MODEL, "--image", path, *ASKED[4:], *QUESTION, "--json")[0] == 0
