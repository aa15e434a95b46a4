"""Methods written as text, for command lines: ``fastv:layer=2,keep=0.25``, or several in a row with ``+`` between."""

import ast
import dataclasses
import re
from typing import Any

from tokenprune.api import build_method
from tokenprune.errors import OptionError
from tokenprune.methods import METHODS, Method

_NAME = re.compile(r"[A-Za-z_]\w*")


def parse_methods(text: str, **defaults: Any) -> tuple[Method, ...]:
    """Build the methods that `text` stands for.

    Args:
        text: `name` or `name:option=value,option=value`, several joined by `+` (applied one after the other). Values
            are Python literals (`prune=(0.4,0.65)`, `merge=None`); anything else is taken as a word.
        **defaults: options for the methods that have them and do not set them themselves.

    Raises:
        OptionError: the text cannot be read, or an option is unknown or out of range.
        UnknownMethodError: no method has this name.
    """
    return tuple(_one(part, defaults) for part in _split(text, "+"))


def _one(text: str, defaults: dict[str, Any]) -> Method:
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not _NAME.fullmatch(name) or (colon and not rest.strip()):
        raise OptionError(f"a method is written as name or name:option=value,option=value, got {text!r}")
    options: dict[str, Any] = {}
    for part in _split(rest, ",") if rest else ():
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not _NAME.fullmatch(key) or not value.strip():
            raise OptionError(f"options are written as option=value with commas between, got {part!r} in {text!r}")
        if key in options:
            raise OptionError(f"option {key} stands twice in {text!r}")
        options[key] = _value(value.strip())
    known = {field.name for field in dataclasses.fields(METHODS[name])} if name in METHODS else set()
    return build_method(name, **({key: value for key, value in defaults.items() if key in known} | options))


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _split(text: str, mark: str) -> list[str]:
    """Parts of `text` between marks that stand outside of brackets; a `+` before a digit is part of a value."""
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
    """Parts of a list of methods with commas between: `aim,fastv:layer=2,keep=0.25` has two, as `keep=...` goes on.

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
