"""The forwards of patched models that run in this thread: one context variable for all, so that nothing of a forward
lives on a module, a class or a global."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from tokenprune.session import Session


@dataclass
class Running:
    """What is known of one forward of one patched model.

    Attributes:
        owner: the session.
        outer: the forward that it takes place in, if any.
    """

    owner: Session
    outer: "Running | None"


_INNERMOST: ContextVar[Running | None] = ContextVar("tokenprune_running", default=None)

R = TypeVar("R", bound=Running)


def innermost() -> Running | None:
    """The forward in which another one begins, if any."""
    return _INNERMOST.get()


def enter(state: Running) -> None:
    """Begin a forward."""
    _INNERMOST.set(state)


def leave(state: Running) -> None:
    """End a forward, and whatever an interrupt left within it."""
    _INNERMOST.set(state.outer)


def current(kind: type[R], session: Session | None = None) -> R | None:
    """The innermost forward of a kind, if it is one of `session` (None: whoever's)."""
    state = _INNERMOST.get()
    while state is not None and not isinstance(state, kind):
        state = state.outer
    return state if state is None or session is None or state.owner is session else None
