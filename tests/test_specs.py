"""Methods written as text."""

import pytest

import tokenprune
from tokenprune import DivPrune, Random, SpAtten, Uniform
from tokenprune.specs import parse_methods, split_methods


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("divprune", (DivPrune(keep=0.1),)),
        ("divprune:keep=0.5", (DivPrune(keep=0.5),)),
        ("random:seed=3, keep=7", (Random(keep=7, seed=3),)),
        ("divprune:keep=auto,radius=0.2,min_keep=None", (DivPrune(keep="auto", radius=0.2),)),
        ("uniform:keep=0.5 + divprune:backend=torch", (Uniform(keep=0.5), DivPrune(keep=0.1, backend="torch"))),
    ],
)
def test_text_becomes_methods(text: str, methods: tuple[tokenprune.Method, ...]) -> None:
    assert parse_methods(text, keep=0.1) == methods


def test_a_default_goes_to_those_that_have_it() -> None:
    assert parse_methods("uniform+random", keep=0.5, seed=9) == (Uniform(keep=0.5), Random(keep=0.5, seed=9))


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        ("", "written as name"),
        ("uniform:", "written as name"),
        ("uniform+", "written as name"),
        ("uniform:keep", "written as option=value"),
        ("uniform:keep=", "written as option=value"),
        ("uniform:keep=0.5,keep=0.6", "stands twice"),
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
    for wrong in ("", "uniform,,random", "uniform,"):
        with pytest.raises(tokenprune.OptionError, match="single commas"):
            split_methods(wrong)
