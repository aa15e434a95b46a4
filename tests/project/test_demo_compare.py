"""The comparison demo: a card for every method, true to what the library says, and one line for every mistake."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from test_demo import model, photo  # noqa: F401

import tokenprune

DEMOS = Path(__file__).resolve().parents[2] / "demos"
METHODS = "divprune,fastv:layer=1,aim:merge=0.5,prune=None,uniform+random,resize"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def _ready() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMOS)
        patch.setattr(transformers.logging, "_tqdm_active", False)
        yield


def demo(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = demo("compare").main([str(part) for part in argv])
        return status, *capsys.readouterr()

    return call


def sheet_of(run: Run, monkeypatch: pytest.MonkeyPatch, *argv: object) -> tuple[Any, str]:
    sheets: list[Any] = []
    draw = demo("compare").draw
    monkeypatch.setattr(demo("compare"), "draw", lambda sheet: sheets.append(sheet) or draw(sheet))
    status, out, err = run(*argv)
    assert status == 0, err
    return sheets[0], out


def test_a_card_for_every_method(run: Run, model: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    argv = ("--image", photo, "--model", model, "--max-new-tokens", 2, "--repeats", 1, "--methods", METHODS)
    questions = ("--question", "what digit is red ?", "--question", "how many ?")
    sheet, out = sheet_of(run, monkeypatch, *argv, *questions)
    cards = {card.title: card for card in sheet.cards}
    assert list(cards) == ["dense", "divprune", "fastv", "aim", "uniform+random", "resize"]
    kept = {name: None if card.tokens is None else card.tokens.n_kept for name, card in cards.items()}
    assert kept == {"dense": None, "divprune": 4, "fastv": 4, "aim": 8, "uniform+random": 4, "resize": None}
    assert all(card.tokens.grid == (4, 4) for card in cards.values() if card.tokens is not None)
    assert (cards["dense"].grid, cards["resize"].grid) == ((4, 4), (2, 2))
    assert cards["resize"].image.size == (16, 16)
    assert cards["fastv"].options == "keep 0.25, layer 1"
    assert cards["aim"].options == "merge 0.5, prune None"
    assert cards["dense"].same == []
    for card in sheet.cards[1:]:
        same = [ours == theirs for ours, theirs in zip(card.answers, cards["dense"].answers, strict=True)]
        assert card.same == same
        for answer in card.answers:
            assert answer in out
    with Image.open("out/compare-photo.png") as page:
        assert np.asarray(page).std() > 20


@pytest.fixture
def sheet(
    run: Run,
    model: Path,  # noqa: F811
    photo: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """The sheet drawn for one question and further arguments."""
    argv = ("--image", photo, "--model", model, "--max-new-tokens", 1, "--repeats", 1, "--question", "how many ?")
    return lambda *further: sheet_of(run, monkeypatch, *argv, *further)[0]


def test_a_keep_that_no_method_goes_by_is_not_told(sheet: Callable[..., Any]) -> None:
    for methods, told in (("divprune:keep=0.5", ["visual tokens"]), ("divprune", ["visual tokens", "keep"])):
        assert [name for _, name in sheet("--methods", methods).stats] == told


def test_every_method_of_the_library_without_being_named(sheet: Callable[..., Any]) -> None:
    drawn = sheet("--output", "x/y.png")
    shown = {card.title for card in drawn.cards}
    assert shown >= {"dense", "divprune", "random", "uniform", "resize"}
    for name in set(tokenprune.list_methods()) - shown:
        assert f"{name.capitalize()} is left out" in drawn.note
    assert Path("x/y.png").exists()


def test_text_stays_inside_its_card() -> None:
    cards, lettering = demo("cards"), demo("lettering")
    many = [
        cards.Card(
            "m" * 90,
            "o" * 200,
            Image.new("RGB", size),
            None,
            None,
            ["f" * 99] * 3,
            ["word " * 80, "w" * 300],
            [True, False],
        )
        for size in ((5, 900), (900, 5), (40, 40))
    ]
    page = cards.draw(cards.Sheet("t" * 200, "m", (("1", "2"),), ["q" * 400, "r"], many, "n " * 300))
    columns = np.asarray(page).astype(int)
    gaps = [cards.MARGIN + place * (cards.WIDTH + cards.GAP) - cards.GAP for place in (1, 2)]
    first = 250 + 4 * 27 * 2
    for gap in gaps:  # nothing is written between the cards
        assert (columns[first : first + 300, gap + 1 : gap + cards.GAP - 1] == cards.BACKGROUND).all()
    room = cards.WIDTH - 2 * cards.PADDING - cards.INDENT
    assert all(lettering.font(20).getlength(line) <= room for line in lettering.lines("w" * 300, room, 20, most=4))


@pytest.mark.parametrize(
    ("argv", "saying"),
    [
        (("--keep", "auto"), "a number"),
        (("--keep", "0"), "must be at least 1"),
        (("--keep", "2.5"), "must lie in (0, 1]"),
        (("--repeats", "0"), "--repeats: must be at least 1"),
        (("--methods", "divprun"), "did you mean 'divprune'"),
        (("--methods", "uniform,"), "single commas"),
        (("--methods", "fastv:layer=7"), "layer=7"),
        (("--output", "x.jpg"), "must end in .png"),
        (("--image", "none.png"), "there is no file"),
        (("--question", ""), "must not be empty"),
    ],
)
def test_wrong_options(run: Run, model: Path, photo: Path, argv: tuple[str, ...], saying: str) -> None:  # noqa: F811
    status, _, err = run("--image", photo, "--model", model, *argv)
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ")
    assert saying in err
