"""Running a block's own forward in two halves, so that tokens can be merged between attention and MLP.

The residual stream between the two branches is local to the block. It is reached by running the forward twice with one
branch silenced: first attention alone, then, on what is left of the tokens, the MLP alone. A silenced branch is given
as good as no tokens, and zeros stand for what it adds. That is exact for blocks of the form `x + attention(norm(x))`,
then `x + mlp(norm(x))`, whatever scales, norms and gates the branches hold, and for no others: whether a block is of
this form is found out by running it once (:func:`fits`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.models.base import Hook

_SILENT: ContextVar[frozenset[nn.Module]] = ContextVar("tokenprune_silent", default=frozenset())


def first_of(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@dataclass(frozen=True)
class HalfBlock:
    """The parts of a block whose forward is to be run in halves.

    Attributes:
        block: the block.
        attention_norm: the norm that the attention branch begins with.
        attention: the attention.
        mlp_norm: the norm that the MLP branch begins with.
        mlp: the MLP.
        spared: tokens that a silenced attention gets. It multiplies them with all its weights, so none is best; but
            some reshape their heads with a -1 and need one.
    """

    block: nn.Module
    attention_norm: nn.Module
    attention: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    spared: int = 0

    def silence(self, branch: nn.Module | None) -> None:
        """Make `branch` (the attention or the MLP) add nothing to the residual stream from now on; None ends that."""
        others = _SILENT.get() - {self.attention, self.mlp}
        _SILENT.set(others if branch is None else others | {branch})

    def hooks(self) -> list[Hook]:
        """The hooks that silence a branch where :meth:`silence` asked for it."""
        attention, mlp, spared = self.attention, self.mlp, self.spared

        def spare_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((args[0][:1, :spared], *args[1:]), kwargs) if attention in _SILENT.get() else None

        def spare_mlp(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((args[0][:1, :0], *args[1:]), kwargs) if mlp in _SILENT.get() else None

        def nothing(
            branch: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            if output is None or branch not in _SILENT.get():  # another may stand in for the branch
                return None
            states = first_of(output)
            zeros = states.new_zeros(1, 1, states.shape[-1])
            return (zeros, *(None for _ in output[1:])) if isinstance(output, tuple) else zeros

        return [
            Hook(self.attention_norm, "pre", spare_attention),
            Hook(attention, "first", partial(nothing, attention)),
            Hook(self.mlp_norm, "pre", spare_mlp),
            Hook(mlp, "first", partial(nothing, mlp)),
        ]

    def finish(self, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """The block's second half: its forward on `x` `[B, M, D]` with the attention silenced."""
        self.silence(self.attention)
        try:
            return self.block.forward(x, **kwargs)
        finally:
            self.silence(None)


@contextmanager
def still(block: nn.Module) -> Iterator[None]:
    """Within the block of code `block` is in evaluation mode, so that it computes the same twice."""
    training = [module for module in block.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def hooked(hooks: list[Hook]) -> Iterator[None]:
    """Within the block of code `hooks` are in place."""
    handles = []
    try:
        for hook in hooks:
            if hook.kind == "pre":
                handles.append(hook.module.register_forward_pre_hook(hook.function, with_kwargs=True))
            else:
                first = hook.kind == "first"
                handles.append(hook.module.register_forward_hook(hook.function, with_kwargs=True, prepend=first))
        yield
    finally:
        for handle in handles:
            handle.remove()


def fits(half: HalfBlock, x: Tensor, kwargs: dict[str, Any], brief: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
    """Whether the two halves of a block give what its forward gives, bit for bit.

    Args:
        half: the block; nothing is left on it.
        x: hidden states to try it on, `[B, N, D]`.
        kwargs: what else its forward takes.
        brief: makes `kwargs` fit a call with the attention silenced.
    """
    with still(half.block):
        wanted = first_of(half.block.forward(x, **kwargs))
        try:
            with hooked(half.hooks()):
                half.silence(half.mlp)
                middle = first_of(half.block.forward(x, **kwargs))
                found = first_of(half.finish(middle, brief(kwargs)))
        except (RuntimeError, ValueError, IndexError, TypeError):  # what it does with as good as no tokens is not ours
            return False
        finally:
            half.silence(None)
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True)
