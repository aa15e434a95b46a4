"""How the names of the libraries below are looked up, and which of their versions are proven.

Nothing is decided by a version: what is needed is looked for, and what is not there under any name known raises. The
list of tested minors serves two ends: messages name it, and a transformers that is newer has to pass the self-check
before a model is touched (:func:`tokenprune.testing.self_check`).
"""

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterable
from functools import reduce
from operator import attrgetter
from typing import Any

from torch import nn

from tokenprune.errors import UnsupportedModelError

TESTED = ("5.17", "5.18", "5.19", "5.20", "5.21", "5.22", "5.23", "5.24")
"""Minors of transformers on which the oracles of all families pass, oldest first."""
_PROVEN: set[type] = set()
_SHOWN = 24  # names in a message


def version_of(library: str = "transformers") -> str:
    """Version of the library that is imported or, failing that, installed."""
    loaded = getattr(sys.modules.get(library), "__version__", None)
    if isinstance(loaded, str):
        return loaded
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def tested() -> str:
    """The tested versions, in words."""
    return f"transformers {TESTED[0]} to {TESTED[-1]}"


def needs_proof(decoder: object) -> bool:
    """Whether the class of `decoder` has to pass the self-check in this process before it is touched: the minor of
    transformers is newer than the newest tested one, and the class has not passed yet."""
    installed, newest = ([int(part) for part in re.findall(r"\d+", one)[:2]] for one in (version_of(), TESTED[-1]))
    return installed > newest and type(decoder) not in _PROVEN


def note_proof(decoder: object) -> None:
    """Note that the class of `decoder` has passed the self-check."""
    _PROVEN.add(type(decoder))


def missing(
    role: str, *, of: str, wanted: Iterable[str], seen: Iterable[object] = (), library: str = "transformers"
) -> UnsupportedModelError:
    """The error for something that is not there under any name known.

    Args:
        role: what was looked for, in neutral words.
        of: where.
        wanted: the names that it is known by.
        seen: the names that are there; those that share a word with the wanted ones are shown first.
        library: the package that it belongs to.
    """
    names = [str(name) for name in seen if not str(name).startswith("_")]
    words = {word for name in wanted for word in re.split(r"[._ ]", name)}
    names.sort(key=lambda name: words.isdisjoint(name.split("_")))  # likely ones first
    names = [*names[:_SHOWN], f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else names
    proven = f"; tested are {tested()}" if library == "transformers" else ""
    return UnsupportedModelError(
        f"{of} has no {role} that is known: looked for {', '.join(wanted)}; {library} {version_of(library)} has "
        f"{', '.join(names) or 'none'}{proven}"
    )


def need(module: str, name: str, *, role: str) -> Any:
    """`name` out of `module` of a library below.

    Raises:
        UnsupportedModelError: it is not there.
    """
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        library = module.partition(".")[0]
        raise missing(role, of=module, wanted=[name], seen=[f"no such name ({error})"], library=library) from error
    return found


def look_up(thing: Any, *paths: str, role: str, library: str = "transformers") -> Any:
    """The first of the attributes at the dotted `paths` that `thing` has.

    Raises:
        UnsupportedModelError: it has none of them.
    """
    for path in paths:
        try:
            return attrgetter(path)(thing)
        except AttributeError:
            continue
    places = paths[0].split(".")[:-1]
    holder = reduce(lambda found, name: getattr(found, name, found), places, thing)
    raise missing(role, of=type(holder).__name__, wanted=paths, seen=seen_in(holder), library=library)


def need_attributes(thing: Any, names: Iterable[str], *, role: str) -> None:
    """Check that `thing` has all attributes `names`.

    Raises:
        UnsupportedModelError: it has not.
    """
    if lacking := [name for name in names if not hasattr(thing, name)]:
        called = thing.__name__ if isinstance(thing, type) else type(thing).__name__
        raise missing(role, of=called, wanted=lacking, seen=seen_in(thing))


def seen_in(thing: Any) -> list[str]:
    """Names of what a module holds (submodules, parameters, attributes), or of all that another thing has."""
    own = vars(thing) if isinstance(thing, nn.Module) else dir(thing)
    names = [*own, *getattr(thing, "_modules", ()), *getattr(thing, "_parameters", ())]
    return [name for name in names if not name.startswith("_")]


def child(module: Any, path: str) -> nn.Module | None:
    """The submodule at a dotted path, None where there is none."""
    found = reduce(lambda holder, name: getattr(holder, name, None), path.split("."), module)
    return found if isinstance(found, nn.Module) else None
