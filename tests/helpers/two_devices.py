"""A model split over two GPUs, without one: tensors say that they stand on a GPU and are computed on the CPU.

Unlike fake tensors these have values, so whole models run and their answers can be compared. Operands on different
devices raise as on a GPU.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)  # These take indices that stand on the CPU.
_VIEWS = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT", "data"))


class OnDevice(Tensor):
    """A tensor with the name of a device; `held` is the CPU tensor with its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "OnDevice":
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.held!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func}: only what goes through a function of torch, within `split`, is computed")


class _Split(TorchFunctionMode):
    """Runs every function of torch on the values, and gives the result the device of its operands."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "__get__" and func not in _VIEWS:
            return func(*args, **kwargs)  # device, shape, dtype
        if func is Tensor.to:
            return _moved(*args, **kwargs)
        if func is Tensor.cpu:
            return values(args[0])
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        placed = {x.device for x in tensors if x.ndim and not (func in _INDEXING and x.device.type == "cpu")}
        if len(placed) > 1 and func is not Tensor.copy_:
            raise RuntimeError(f"{func}: tensors on different devices, {sorted(map(str, placed))}")
        device = next((x.device for x in tensors if isinstance(x, OnDevice)), torch.device("cpu"))
        if kwargs.get("device") is not None:
            device, kwargs["device"] = torch.device(kwargs["device"]), "cpu"
        given = {id(x.held): x for x in tensors if isinstance(x, OnDevice)}  # What an operation in place returns.
        result = func(*tree_map(values, args), **tree_map(values, kwargs))
        result = list(result) if func is Tensor.__iter__ else result
        result = tree_map(lambda x: given.get(id(x), on(device, x)), result)
        return iter(result) if func is Tensor.__iter__ else result


def _moved(x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
    """`x.to(...)`."""
    device, dtype, _, _ = torch._C._nn._parse_to(*map(values, args), **tree_map(values, kwargs))
    like = next((y for y in (*args, *kwargs.values()) if isinstance(y, Tensor)), None)
    device = like.device if like is not None else device or x.device
    if device == x.device and dtype in (None, x.dtype) and not copy:
        return x
    return on(device, values(x).to(dtype or x.dtype, copy=True))


def values(x: Any) -> Any:
    """The CPU tensor with the values; anything else as it is."""
    return x.held if isinstance(x, OnDevice) else x


def on(device: torch.device | str, x: Any) -> Any:
    """`x`, or the tensors in it, with the name of a device."""
    device = torch.device(device)

    def place(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        return values(part) if device.type == "cpu" else OnDevice(values(part), device)

    return tree_map(place, x)


def _align(module: nn.Module, device: str) -> None:
    """Let arguments follow a module to its device as accelerate does: in its forward, so after its hooks."""
    forward = module.forward

    def move(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    @functools.wraps(forward)
    def aligned(*args: Any, **kwargs: Any) -> Any:
        return forward(*tree_map(move, args), **tree_map(move, kwargs))

    module.forward = aligned


@contextmanager
def split(model: nn.Module, place: Callable[[str], str]) -> Iterator[nn.Module]:
    """Let a model stand on several devices; what is computed on them is computed within the context.

    Args:
        model: changed in place.
        place: device of every module, by its name.
    """
    for name, module in model.named_modules():
        if not any(module.children()) or name.rpartition(".")[2].isdigit():
            _align(module, place(name))
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    table[key] = OnDevice(tensor.detach(), torch.device(place(name)))
    with _Split(), torch.no_grad():
        yield model
