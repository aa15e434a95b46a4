"""What the ops refuse, each rule in one place: the message says what an op needs and what it got."""

import math
import sys

import torch
from torch import Tensor

from tokenprune.errors import InputError, OptionError, TokenPruneError

LEAST_POSITIVE, LARGEST = math.ulp(0.0), sys.float_info.max  # Bounds of positive and of finite numbers.


def check_number(
    op: str, name: str, value: object, what: str, low: float, high: float = LARGEST, *, whole: bool = False
) -> None:
    """Raise `OptionError` unless `value` is a number (an int where `whole`) from `low` to `high`; `what` says so."""
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise OptionError(f"{op} needs {what} as {name}; got {value!r}.")


def check_count(op: str, name: str, value: object, low: int, high: int) -> None:
    """Raise `OptionError` unless `value` is an int from `low` to `high`."""
    if type(value) is int and low <= value <= high:
        return
    check_number(op, name, value, f"an int from {low} to {high}", low, high, whole=True)


def check_softcap(op: str, softcap: float | None) -> None:
    """Raise `OptionError` unless `softcap` is None or a positive, finite number."""
    if softcap is not None:
        check_number(op, "softcap", softcap, "a positive, finite number, or None,", LEAST_POSITIVE)


def check_tensor(
    op: str,
    name: str,
    x: Tensor | None,
    dtypes: str,
    *shapes: tuple[int, ...],
    devices: tuple[torch.device, ...] = (),
    error: type[TokenPruneError] = InputError,
) -> None:
    """Raise unless a tensor, where there is one, is what an op needs.

    Args:
        op: name of the op.
        name: name of the argument.
        x: the tensor, or None.
        dtypes: names of the dtypes that it may have, "floats" for all float dtypes, as in "torch.bool or floats".
        shapes: the shapes that it may have.
        devices: where it may lie; anywhere by default.
        error: what is raised.
    """
    if x is None:
        return
    dtype = "floats" if x.is_floating_point() else str(x.dtype)
    if dtype in dtypes.split(" or ") and tuple(x.shape) in shapes and (not devices or x.device in devices):
        return
    wanted, place = " or ".join(str(list(shape)) for shape in shapes), ""
    if devices:
        place = " on " + " or ".join(dict.fromkeys(str(device) for device in devices))
    raise error(f"{op} needs {name} as {dtypes} {wanted}{place}; got {x.dtype} {list(x.shape)} on {x.device}.")
