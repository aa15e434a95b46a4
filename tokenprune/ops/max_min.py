"""Greedy max-min selection of diverse tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.errors import InputError
from tokenprune.ops import max_min_search
from tokenprune.ops.backend import find_kernel
from tokenprune.ops.checks import check_count, check_number, check_tensor


class MaxMinSelection(NamedTuple):
    """What `max_min_select` chose.

    Attributes:
        index: `[B, k]` int64, the chosen tokens in ascending order.
        order: `[B, k]` int64, the same tokens as they were chosen; its first `i` are the choice for `k = i`.
        radius: `[B]` fp32, the largest cosine distance of a valid token to its nearest chosen one; 0 if all are chosen.
        radius_path: `[B, k]` fp32, that radius after 1, 2, ... k choices; it never grows.
    """

    index: Tensor  # type: ignore[assignment]
    order: Tensor
    radius: Tensor
    radius_path: Tensor


class MaxMinCover(NamedTuple):
    """What `max_min_cover` chose: as many tokens per row as the radius asks for.

    Attributes:
        order: `[B, K]` int64, the chosen tokens as they were chosen, `-1` from `n_kept` on; `K = n_kept.max()`.
        n_kept: `[B]` int64, the number of tokens chosen.
        radius: `[B]` fp32, the radius reached; above the one asked for only where `max_k` ended the search.
    """

    order: Tensor
    n_kept: Tensor
    radius: Tensor


@torch.no_grad()
def max_min_select(features: Tensor, *, k: int, valid: Tensor | None = None, backend: str = "auto") -> MaxMinSelection:
    """Choose the `k` most diverse tokens of every row: greedy max-min of cosine distance (DivPrune, arXiv 2503.02175).

    The first choice is the valid token whose nearest other valid token is farthest; each next one is the valid token
    whose smallest distance to the chosen ones is largest. Ties go to the lowest index, and a token is chosen once, so
    the `k` tokens are distinct. The cosine is accumulated in fp32 whatever the dtype. Distances below 2^-20 are fp32
    noise and count as 0, so that equal tokens tie. A vector that is zero, or holds a NaN or an infinity, has cosine 0
    to every other one: defined, but whoever minds a NaN looks for it first.

    What is chosen in a row depends on its valid tokens and on `k` alone, never on the batch or the padding around it.
    Extra memory stays below the larger of 64 MiB and the features' own bytes.

    Args:
        features: `[B, N, D]`, any float dtype, any strides.
        k: tokens to choose per row, `1 <= k <= N`.
        valid: `[B, N]` bool, the tokens that take part; all of them by default. On a GPU, counting them synchronises.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        A `MaxMinSelection`, on the device of the features.

    Raises:
        OptionError: `k` or `backend` is out of range.
        InputError: a shape or dtype is wrong, or a row has fewer than `k` valid tokens.
        BackendError: the explicit backend cannot run here.
    """
    _check_features("max_min_select", features, valid)
    check_count("max_min_select", "k", k, 1, features.shape[1])
    _check_enough("max_min_select", "k", k, valid)
    kernel = find_kernel("max_min_select", "max_min_select", backend, features)
    if kernel is not None:
        order, path = kernel.launch(features, valid, k, memory=max_min_search.MEMORY)
    else:
        order, path = max_min_search.choose(features, valid, k, k)
    return MaxMinSelection(order.sort(dim=1).values, order, path[:, -1].contiguous(), path)


@torch.no_grad()
def max_min_cover(
    features: Tensor,
    *,
    radius: float,
    max_k: int,
    min_k: int = 1,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> MaxMinCover:
    """Choose as `max_min_select` does until every valid token lies within a cosine distance `radius` of a chosen one.

    The torch version stops there. The Triton version makes all `max_k` choices and cuts off what is too many: to stop
    it would have to synchronise.

    Args:
        features: `[B, N, D]`, any float dtype, any strides.
        radius: the cosine distance, 0 to 2.
        max_k: tokens to choose per row at most, `min_k <= max_k <= N`; never more than are valid.
        min_k: tokens to choose per row at least.
        valid: `[B, N]` bool, the tokens that take part; all of them by default. On a GPU, counting them synchronises.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        A `MaxMinCover`, on the device of the features.

    Raises:
        OptionError: `radius`, `min_k`, `max_k` or `backend` is out of range.
        InputError: a shape or dtype is wrong, or a row has fewer than `min_k` valid tokens.
        BackendError: the explicit backend cannot run here.
    """
    _check_features("max_min_cover", features, valid)
    check_count("max_min_cover", "max_k", max_k, 1, features.shape[1])
    check_count("max_min_cover", "min_k", min_k, 1, max_k)
    check_number("max_min_cover", "radius", radius, "a cosine distance between 0 and 2", 0, 2)
    _check_enough("max_min_cover", "min_k", min_k, valid)
    radius = torch.tensor(radius, dtype=torch.float32, device="cpu").item()  # What both backends compare in.
    kernel = find_kernel("max_min_cover", "max_min_select", backend, features)
    if kernel is not None:
        order, path = kernel.launch(features, valid, max_k, memory=max_min_search.MEMORY)
    else:
        order, path = max_min_search.choose(features, valid, max_k, min_k, radius)
    n_kept = ((path > radius).sum(1) + 1).clamp_min(min_k).minimum((order >= 0).sum(1))
    width = int(n_kept.max()) if len(n_kept) else 0
    dropped = torch.arange(width, dtype=torch.int64, device=features.device) >= n_kept[:, None]
    return MaxMinCover(order[:, :width].masked_fill(dropped, -1), n_kept, path.gather(1, n_kept[:, None] - 1)[:, 0])


def _check_features(op: str, features: Tensor, valid: Tensor | None) -> None:
    if features.ndim != 3 or not features.is_floating_point() or 0 in features.shape[1:]:
        raise InputError(
            f"{op} needs features [B, N, D] of a float dtype with at least one token and one channel; "
            f"got {features.dtype} {list(features.shape)}."
        )
    check_tensor(op, "valid", valid, "torch.bool", tuple(features.shape[:2]), devices=(features.device,))


def _check_enough(op: str, name: str, value: int, valid: Tensor | None) -> None:
    if valid is None or not len(valid):
        return
    n_valid = valid.sum(1).tolist()
    least = min(n_valid)
    if least < value:
        raise InputError(
            f"{op} was asked for {name}={value} tokens, but row {n_valid.index(least)} has only {least} valid ones; "
            f"{name} may be at most {least} for this batch, or each row is given by itself."
        )
