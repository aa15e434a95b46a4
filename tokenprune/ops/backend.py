"""Which version of an op runs, and the only door to the kernels."""

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import BackendError, OptionError


def find_kernel(op: str, name: str, backend: str, tensor: Tensor) -> Any:
    """The module `kernels/<name>.py` where the Triton version of `op` is to run, `None` where the torch version is.

    Args:
        op: name of the op, for messages.
        name: name of the kernel's file.
        backend: `"auto"`, `"torch"` or `"triton"`.
        tensor: an argument of the op; its device decides.

    Raises:
        OptionError: there is no such backend.
        BackendError: the explicit backend cannot run here.
    """
    if backend not in ("auto", "torch", "triton"):
        raise OptionError(f"{op} knows the backends 'auto', 'torch' and 'triton'; got {backend!r}.")
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return None
    if importlib.util.find_spec("triton") is None:
        if backend == "auto":
            return None
        raise BackendError(f"{op} was asked for backend='triton', but Triton is not installed; 'torch' works here.")
    kernel = importlib.import_module(f"tokenprune.kernels.{name}")  # Imports Triton, so not before it is wanted.
    if not (tensor.is_cuda or importlib.import_module("tokenprune.kernels.common").INTERPRETED):
        raise BackendError(
            f"{op} was asked for backend='triton' on a {tensor.device.type} tensor: Triton needs a CUDA tensor, or "
            "TRITON_INTERPRET=1 in the environment before it is imported; 'torch' and 'auto' work here."
        )
    return kernel


def uncast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, where it is on: products have the dtype of what is multiplied."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def product(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``left @ right`` of fp32 tensors in fp32, also where the program allows fewer bits for such products
    (``torch.set_float32_matmul_precision``): the cosine of equal vectors is 1."""
    place = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(left.device.type)
    if place is None or place.matmul.fp32_precision in ("ieee", "none"):
        return torch.matmul(left, right, out=out)
    found = (left.double() @ right.double()).float()
    return found if out is None else out.copy_(found)
