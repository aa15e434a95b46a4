"""Methods written as text, for command lines: ``fastv:layer=2,keep=0.25``, or several in a row with ``+`` between."""

import ast
import re
from collections.abc import Iterator
from typing import Any

from tokenprune.api import build_method
from tokenprune.errors import OptionError
from tokenprune.methods import METHODS, Method
from tokenprune.methods.base import options_of

_NAME = re.compile(r"[A-Za-z_]\w*")


def parse_methods(text: str, **defaults: Any) -> tuple[Method, ...]:
    """Build the methods that `text` names.

    Args:
        text: `name` or `name:option=value,option=value`, several joined by `+` (applied one after the other). Values
            are Python literals (`prune=(0.4,0.65)`, `merge=None`, also `none`); anything else is taken as a word.
        **defaults: options for the methods that take them, see :func:`takes`.

    Raises:
        OptionError: the text cannot be read, or an option is unknown or out of range.
        UnknownMethodError: no method has this name.
    """
    return tuple(
        build_method(name, **{key: value for key, value in defaults.items() if _takes(name, own, key)}, **own)
        for name, own in _read(text)
    )


def methods_with(text: str, **options: Any) -> tuple[Method, ...]:
    """:func:`parse_methods` where each of the options counts for one of the methods at least.

    Raises:
        OptionError: as there, or no method takes one of `options`.
        UnknownMethodError: as there.
    """
    names = [name for name, _ in _read(text)]
    unused = [key for key in options if not takes(text, key)]
    if unused and METHODS.keys() >= set(names):
        key, has = unused[0], "; ".join(f"{name} has {', '.join(options_of(METHODS[name]))}" for name in names)
        raise OptionError(
            f"{key}={options[key]!r} was given beside {text!r}, and no method there takes it: each sets it itself or "
            f"has no such option ({has}); omit {key}, and write options as name:option=value"
        )
    return parse_methods(text, **options)


def takes(text: str, option: str) -> bool:
    """Whether a method of `text` would take an `option` that is given beside it: it has one and does not set it itself.

    A `keep` is not taken by a method whose `r` says how much it removes.

    Raises:
        OptionError: the text cannot be read.
    """
    return any(_takes(name, own, option) for name, own in _read(text))


def _takes(name: str, own: dict[str, Any], option: str) -> bool:
    known = name in METHODS and option in options_of(METHODS[name])
    return known and option not in own and not (option == "keep" and own.get("r") is not None)


def _read(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of each method."""
    for method in _split(text, "+"):
        name, colon, rest = method.partition(":")
        if not _NAME.fullmatch(name.strip()) or (colon and not rest.strip()):
            raise OptionError(f"a method is written as name or name:option=value,option=value, got {method!r}")
        options: dict[str, Any] = {}
        for part in _split(rest, ",") if rest else ():
            key, _, value = (word.strip() for word in part.partition("="))
            if not _NAME.fullmatch(key) or not value:
                raise OptionError(
                    f"options are written as option=value with commas between, got {part!r} in {method!r}"
                )
            if key in options:
                raise OptionError(f"option {key} is given twice in {method!r}")
            options[key] = _value(value)
        yield name.strip(), options


def _value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _split(text: str, mark: str) -> list[str]:
    """Parts of `text` between marks outside of brackets; a `+` before a digit is part of a value."""
    parts, depth = [""], 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        value = character == "+" and text[place + 1 : place + 2].isdigit()
        if character == mark and depth == 0 and not value:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def split_methods(text: str) -> list[str]:
    """Parts of a list of methods with commas between: `aim,fastv:layer=2,keep=0.25` has two, as `keep=...` belongs to
    the second.

    Raises:
        OptionError: the list is empty or begins with an option.
    """
    found: list[str] = []
    for part in _split(text, ","):
        if found and re.match(r"\s*\w+\s*=", part):
            found[-1] += f",{part}"
        elif not part.strip():
            raise OptionError(f"methods are written with single commas between, got {text!r}")
        else:
            found.append(part.strip())
    return found
