"""Methods that take part inside the blocks of a vision encoder: what they are, and whether what they answer fits."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from tokenprune.engine import Engine
from tokenprune.errors import InputError
from tokenprune.reduction import Keep, Merge, Reduction
from tokenprune.signals import AttentionPlan, BlockSignals, Budget

SITE = "encoder_block"


class BlockMethod(Protocol):
    """What a method that takes part inside encoder blocks declares, see :class:`tokenprune.Method`."""

    name: str
    uses_attention_scores: bool
    proportional: bool
    restore: bool
    backend: str
    removals: Callable[..., tuple[int, ...]]
    attention_plan: Callable[[int], AttentionPlan | None]
    encoder_block: Callable[[BlockSignals, Budget], Reduction]


def methods_of(engine: Engine) -> tuple[BlockMethod, ...]:
    """The methods of a session that take part inside encoder blocks, in order."""
    reducers: tuple[Any, ...] = engine.reducers(SITE)
    return tuple(reducer.method for reducer in reducers)


def restores(engine: Engine) -> bool:
    """Whether what leaves the encoder gets all its tokens back."""
    return all(method.restore for method in methods_of(engine))


def check_answer(answer: Any, name: str, shape: tuple[int, int], n_out: int, n_prefix: int) -> None:
    """Check what a method answered. On a GPU only shapes are looked at: the rest would wait for it.

    Raises:
        InputError: it is no reduction of `shape` tokens to `n_out` that leaves the first `n_prefix` alone.
    """
    due = f"a Keep or a Merge of {shape[0]} rows of {shape[1]} tokens to {n_out} was due"
    who = f"method {name!r} at site {SITE!r} returned"
    if not isinstance(answer, Keep | Merge) or answer.valid is not None:
        raise InputError(f"{who} {type(answer).__name__}{' with gaps' if isinstance(answer, Keep) else ''}; {due}")
    index = answer.index
    if index.shape != (shape[0], n_out) or index.dtype != torch.int64:
        raise InputError(f"{who} an index {index.dtype} {list(index.shape)}; {due}")
    if isinstance(answer, Merge) and (answer.assign.shape != shape or answer.assign.dtype != torch.int64):
        raise InputError(f"{who} groups {answer.assign.dtype} {list(answer.assign.shape)}; {due}")
    if index.device.type != "cpu":
        return
    inside = bool((index[:, :1] >= 0).all() and (index[:, -1:] < shape[1]).all() and (index.diff() > 0).all())
    prefix = not n_prefix or bool((index[:, n_prefix - 1] == n_prefix - 1).all())  # none fits before it but those
    if not inside or not prefix:
        raise InputError(
            f"{who} positions {index[0].tolist()} for the first row; {due}: ascending, and the first {n_prefix} "
            "(class, distillation, registers) among them"
        )
    if not isinstance(answer, Merge):
        return
    own = torch.equal(answer.assign.gather(1, index), torch.arange(n_out).expand_as(index))
    if not own or bool((answer.assign[:, n_prefix:] < n_prefix).any()):
        raise InputError(f"{who} groups that do not stand at tokens of their own, or merge a class token; {due}")
