"""Running a block's own forward with all tokens up to its MLP and with fewer from there on.

The residual stream between the two branches is local to the forward, and no hook is asked for another one. But the norm
that the MLP branch begins with is handed the very tensor that the MLP's output is added to later, and that tensor can
be made another one on the spot. This is exact for blocks of the form `x + attention(norm(x))`, then `x + mlp(norm(x))`,
whatever scales, norms and gates the branches hold, and for no others: whether a block is of this form is found out by
running it (:func:`has_halves`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.hooks import Hook
from tokenprune.upstream.tower import Keys


def first_of(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module is called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def reading(keys: Keys, found: Callable[[Tensor], None]) -> Hook:
    """A hook that hands a block's keys (or queries) to `found`."""

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        found(keys.read(output[0] if output else first_argument(args, kwargs)))

    return Hook(keys.module, keys.kind, read)


def replace_in_place(x: Tensor, other: Tensor) -> None:
    """Make the tensor `x` what `other` is (values, shape, history) for everyone who holds it. No memory is written."""
    if x.requires_grad or other.requires_grad:
        torch.utils.swap_tensors(x, other)  # type: ignore[no-untyped-call]
    else:
        x.set_(other)  # type: ignore[call-overload]


@contextmanager
def evaluating(block: nn.Module) -> Iterator[None]:
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


def attempt(block: nn.Module, x: Tensor, kwargs: dict[str, Any], *hooks: Hook) -> Any:
    """What a block's own forward makes of `x` `[B, N, D]` while `hooks` are in place; nothing is left on it."""
    handles = []
    try:
        for hook in hooks:
            before = hook.kind == "pre"
            register: Any = hook.module.register_forward_pre_hook if before else hook.module.register_forward_hook
            handles.append(register(hook.function, with_kwargs=True))
        with evaluating(block):
            return block.forward(x, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def has_halves(
    block: nn.Module, norm: nn.Module, mlp: nn.Module, x: Tensor, kwargs: dict[str, Any], whole: Tensor
) -> bool:
    """Whether a block gives the same for the other tokens when the last one is dropped between attention and MLP.

    Args:
        block: the block.
        norm: the norm that its MLP branch begins with.
        mlp: its MLP.
        x: hidden states to try it on, `[B, N, D]`.
        kwargs: what else its forward takes.
        whole: what it makes of all of them, `[B, N, D]`.
    """
    n_left, entered = x.shape[1] - 1, list[int]()

    def shorten(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = first_argument(args, kwargs)
        if given is not x:  # else its branches stand side by side
            replace_in_place(given, given[:, :n_left].clone())

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(first_argument(args, kwargs).shape[1])

    try:
        found = first_of(attempt(block, x, kwargs, Hook(norm, "pre", shorten), Hook(mlp, "pre", count)))
    except (RuntimeError, ValueError, IndexError, TypeError):  # what it does with one token less is not ours
        return False
    return entered == [n_left] and agree(found, whole[:, :n_left])


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are the same but for the order of sums in the dtype of `found`."""
    close = 1e-4 if found.dtype in (torch.float32, torch.float64) else 3e-2
    if found.shape != wanted.shape:
        return False
    return float((found - wanted).abs().max()) <= close * max(1e-6, float(wanted.abs().max()))
