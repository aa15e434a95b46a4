"""Methods that take part inside the blocks of a vision encoder: what they are, and whether what they answer fits."""

from typing import Any, Protocol, cast

import numpy as np
import torch

from tokenprune.engine import Engine
from tokenprune.errors import InputError
from tokenprune.reduction import Keep, Merge

SITE = "encoder_block"


class BlockReducer(Protocol):
    """A method that takes part inside encoder blocks, as the session hands it over."""

    @property
    def name(self) -> str:
        """Name of the method."""
        ...

    @property
    def method(self) -> Any:
        """The method: it has `removals` and `encoder_block`."""
        ...


def reducers_of(engine: Engine) -> tuple[BlockReducer, ...]:
    """The methods of a session that take part there, in order."""
    return cast(tuple[BlockReducer, ...], engine.reducers(SITE))


def is_proportional(reducers: tuple[BlockReducer, ...]) -> bool:
    """Whether attention is to count a token by its size."""
    return any(getattr(reducer.method, "proportional", False) for reducer in reducers)


def restores(reducers: tuple[BlockReducer, ...]) -> bool:
    """Whether what leaves the encoder gets all its tokens back."""
    return all(getattr(reducer.method, "restore", True) for reducer in reducers)


def is_scored(reducers: tuple[BlockReducer, ...]) -> bool:
    """Whether a method goes by the attention that tokens gather."""
    return any(reducer.method.uses_attention_scores for reducer in reducers)


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
    places = index.numpy()
    inside = (places[:, :1] >= 0).all() and (places[:, -1:] < shape[1]).all()
    prefix = not n_prefix or (places[:, n_prefix - 1] == n_prefix - 1).all()  # none fits before it but those
    if not inside or not prefix or (places[:, 1:] <= places[:, :-1]).any():
        raise InputError(
            f"{who} positions {index[0].tolist()} for the first row; {due}: ascending, and the first {n_prefix} "
            "(class, distillation, registers) among them"
        )
    if not isinstance(answer, Merge):
        return
    groups = answer.assign.numpy()
    own = (groups[np.arange(shape[0])[:, None], places] == np.arange(n_out)).all()
    if not own or (groups[:, n_prefix:] < n_prefix).any():
        raise InputError(f"{who} groups that do not stand at tokens of their own, or merge a class token; {due}")
