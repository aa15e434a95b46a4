"""What the options of a method may be: declared beside each option, checked when a method is made.

``layer: int = option(2, at_least(1))`` is an option with default 2 that must be an int of at least 1.
"""

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

from tokenprune.errors import OptionError
from tokenprune.schedule import check_keep, is_int

Check = Callable[[str, Any], None]
"""Takes the name of an option and its value, and raises an `OptionError` where the value does not fit."""


def option(default: Any, check: Check) -> Any:
    """A field of a method whose value has to pass `check`."""
    return field(default=default, metadata={"check": check})


def check_options(method: Any) -> None:
    """Run the checks of all options of `method`. A `keep` without one of its own must be a fraction or a count.

    Raises:
        OptionError: a value does not fit.
    """
    for entry in fields(method):
        check = entry.metadata.get("check", keep_check if entry.name == "keep" else None)
        if check is not None:
            check(entry.name, getattr(method, entry.name))


def must_be(wanted: str, fits: Callable[[Any], bool]) -> Check:
    """The check of an option that must be `wanted`, which is so where `fits` returns True."""

    def check(name: str, value: Any) -> None:
        if not fits(value):
            raise OptionError(f"{name} must be {wanted}, got {value!r}")

    return check


def at_least(least: int) -> Check:
    """The check of an int."""
    return must_be(f"an int of at least {least}", lambda value: is_int(value) and value >= least)


def one_of(*choices: str | None) -> Check:
    """The check of an option with a few values, two at least."""
    *others, last = map(repr, choices)
    return must_be(f"{', '.join(others)} or {last}", lambda value: value in choices)


true_or_false = must_be("True or False", lambda value: isinstance(value, bool))
backend_name = one_of("auto", "torch", "triton")


def keep_check(name: str, value: Any) -> None:
    """The check of what is kept: a float in (0, 1] or an int of at least 1."""
    check_keep(value, name=name)


def or_none(check: Check) -> Check:
    """`check` for an option that may also be None."""
    return lambda name, value: None if value is None else check(name, value)


def layers_or_depths(value: Any) -> list[Any]:
    """`value` as a list if it holds ints (layers) or floats (relative to a decoder's depth) alone, else []."""
    ends = list(value) if isinstance(value, tuple | list) else []
    return ends if all(map(is_int, ends)) or all(isinstance(end, float) for end in ends) else []


def no_keep(method: str, has: str) -> Any:
    """The field `keep` of a method that `has` options in its place; it is shown nowhere."""

    def check(name: str, value: Any) -> None:
        if value != 1.0:
            raise OptionError(f"method {method!r} has {has}, no keep; got keep={value!r}")

    return field(default=1.0, repr=False, metadata={"check": check})
