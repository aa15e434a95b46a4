"""Methods written as text."""

import re

import pytest

import tokenprune
from tokenprune import AIM, DivPrune, Random, SpAtten, ToMe, Uniform
from tokenprune.parsing import methods_with, parse_methods, split_methods, takes


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("divprune", (DivPrune(keep=0.1),)),
        ("divprune:keep=0.5", (DivPrune(keep=0.5),)),
        ("spatten:protect_text=false", (SpAtten(protect_text=False),)),
        ("spatten:protect_text=true+aim:prune=none", (SpAtten(protect_text=True), AIM(prune=None))),
        ("random:seed=3, keep=7", (Random(keep=7, seed=3),)),
        ("divprune:keep=auto,radius=0.2,min_keep=None", (DivPrune(keep="auto", radius=0.2),)),
        ("uniform:keep=0.5 + divprune:backend=torch", (Uniform(keep=0.5), DivPrune(keep=0.1, backend="torch"))),
    ],
)
def test_text_becomes_methods(text: str, methods: tuple[tokenprune.Method, ...]) -> None:
    assert parse_methods(text, keep=0.1) == methods


def test_a_default_goes_to_those_that_have_it() -> None:
    assert parse_methods("uniform+random", keep=0.5, seed=9) == (Uniform(keep=0.5), Random(keep=0.5, seed=9))


def test_a_default_keep_goes_to_no_method_that_sets_how_much_is_left_itself() -> None:
    assert parse_methods("divprune+aim", keep=0.5) == (DivPrune(keep=0.5), AIM())
    assert parse_methods("spatten+uniform", keep=0.5) == (SpAtten(), Uniform(keep=0.5))
    assert parse_methods("divprune+tome:r=2", keep=0.5) == (DivPrune(keep=0.5), ToMe(r=2))
    assert parse_methods("tome:r=None", keep=0.5) == (ToMe(keep=0.5),)
    texts = ("divprune+aim", "divprune+tome:r=2", "tome", "aim", "tome:r=2", "divprune:keep=0.3", "aim+spatten")
    assert [text for text in texts if takes(text, "keep")] == ["divprune+aim", "divprune+tome:r=2", "tome"]


@pytest.mark.parametrize("text", ["aim", "aim+spatten", "tome:r=2", "divprune:keep=0.3"])
def test_an_option_that_no_method_takes_is_refused(text: str) -> None:
    assert methods_with(text) == parse_methods(text)
    with pytest.raises(tokenprune.OptionError, match=rf"keep=0.5 was given beside '{re.escape(text)}'.*has "):
        methods_with(text, keep=0.5)
    with pytest.raises(tokenprune.UnknownMethodError):
        methods_with(f"{text}+unifrom", keep=0.5)
    assert methods_with(f"{text}+uniform", keep=0.5)[-1] == Uniform(keep=0.5)


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        ("", "written as name"),
        ("uniform:", "written as name"),
        ("uniform+", "written as name"),
        ("uniform:keep", "written as option=value"),
        ("uniform:keep=", "written as option=value"),
        ("uniform:keep=0.5,keep=0.6", "is given twice"),
        ("uniform:keep=(1,2)", "keep must be"),
        ("uniform:keep=half", "keep must be"),
        ("uniform:colour=1", "no option 'colour'"),
        ("unifrom", "did you mean 'uniform'"),
    ],
)
def test_text_that_cannot_be_read(text: str, saying: str) -> None:
    with pytest.raises(tokenprune.TokenPruneError, match=saying.replace("(", r"\(")):
        parse_methods(text)


def test_a_plus_inside_a_value_is_part_of_it() -> None:
    found = parse_methods("spatten:tokens=1.0,quantize=4+4+uniform:keep=3")
    assert found == (SpAtten(tokens=1.0, quantize="4+4"), Uniform(keep=3))


def test_lists_of_methods() -> None:
    text = "uniform, divprune:keep=auto,radius=0.2 ,random+uniform:keep=3,fake:pair=(1,2),x=1"
    assert split_methods(text) == [
        "uniform",
        "divprune:keep=auto,radius=0.2 ",
        "random+uniform:keep=3",
        "fake:pair=(1,2),x=1",
    ]
    text = "fastv:layer=2,keep=0.5+random:seed=1,tome:r=[9,9,9,9]"
    assert split_methods(text) == ["fastv:layer=2,keep=0.5+random:seed=1", "tome:r=[9,9,9,9]"]
    for wrong in ("", "uniform,,random", "uniform,"):
        with pytest.raises(tokenprune.OptionError, match="single commas"):
            split_methods(wrong)
