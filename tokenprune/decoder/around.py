"""What the modules around the root were called with, where the root does not see it: ids that embeddings were
computed from, and how many logits are wanted."""

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokenprune.hooks import Hook
from tokenprune.session import Session
from tokenprune.upstream.prompts import Prompt


@dataclass(frozen=True)
class _Noted:
    """What was noted of the call that runs.

    Attributes:
        session: that of the patched model.
        prompt: the arguments of the innermost module that was called with ids, if one was.
        n_logits: of how many of the last tokens logits are wanted; None: of all, or nothing was said.
    """

    session: Session
    prompt: Prompt | None = None
    n_logits: int | None = None


_NOTED: ContextVar[_Noted | None] = ContextVar("tokenprune_around", default=None)


def hooks_of(session: Session, embedders: list[nn.Module], callers: list[nn.Module]) -> list[Hook]:
    """The hooks of the modules around the root.

    Args:
        session: that of the patched model.
        embedders: those that take ids and may hand on embeddings, outermost first.
        callers: those that take the number of logits that are wanted, outermost first.
    """

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prompt, noted = Prompt.read(module, args, kwargs), _NOTED.get() or _Noted(session)
        if module in embedders and (prompt.ids is not None or module is embedders[0]):
            noted = replace(noted, session=session, prompt=None if prompt.ids is None else prompt)
        if module in callers:
            noted = replace(noted, n_logits=prompt.n_logits)
        _NOTED.set(noted)

    def forget(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _NOTED.set(None)

    around = [*embedders, *(module for module in callers if module not in embedders)]
    return [hook for module in around for hook in (Hook(module, "pre", note), Hook(module, "post", forget))]


def with_ids(session: Session, prompt: Prompt) -> Prompt:
    """`prompt`, together with what a module around was called with where that has the ids that `prompt` lacks."""
    noted = _NOTED.get()
    if noted is None or noted.session is not session or noted.prompt is None:
        return prompt
    _NOTED.set(replace(noted, prompt=None))  # no hook runs after a KeyboardInterrupt, and the inputs should not stay
    ids, embeds = noted.prompt.ids, prompt.embeds
    if prompt.ids is not None or embeds is None or ids is None or ids.shape != embeds.shape[:2]:
        return prompt
    return Prompt({**noted.prompt.given, **{name: value for name, value in prompt.given.items() if value is not None}})


def n_logits_of(prompt: Prompt) -> int:
    """Of how many of the last tokens logits are asked for, at least one."""
    noted = _NOTED.get()
    return prompt.n_logits or (noted.n_logits if noted is not None else None) or 1
