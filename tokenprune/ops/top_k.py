"""Selection of the k largest scores of every row, in the order in which they stand (SpAtten's top-k engine)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import InputError, OptionError
from tokenprune.ops.backend import find_kernel
from tokenprune.ops.checks import check_count, check_tensor

_LEAST = torch.iinfo(torch.int32).min


def top_k_select(
    scores: Tensor, *, k: int | Sequence[int] | Tensor, valid: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Choose the `k` largest scores of every row (SpAtten, arXiv 2012.09852, section IV-B).

    Scores are compared in fp32 whatever the dtype. Ties go to the lowest index; both zeros are equal; a NaN is below
    everything, minus infinity too. What is chosen in a row depends on its valid scores and its count alone. The result
    has no gradient.

    Args:
        scores: `[B, N]`, any float dtype, any strides.
        k: how many to choose: an int for all rows, `1 <= k <= N`, or one int per row, `0 <= k <= N`, as a sequence or
            as an int64 tensor `[B]` (on a GPU, reading it synchronises).
        valid: `[B, N]` bool, the scores that take part; all of them by default. On a GPU, counting them synchronises.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[B, M]` int64, ascending indices; M is `k`, or the largest `k` of a row: shorter rows end in `-1`.

    Raises:
        OptionError: `k` or `backend` is out of range.
        InputError: a shape or dtype is wrong, or a row has fewer valid scores than are to be chosen.
        BackendError: the explicit backend cannot run here.
    """
    if scores.ndim != 2 or not scores.is_floating_point() or scores.shape[1] == 0:
        raise InputError(
            "top_k_select needs scores [B, N] of a float dtype with at least one entry per row; "
            f"got {scores.dtype} {list(scores.shape)}."
        )
    counts = None
    if isinstance(k, int):
        check_count("top_k_select", "k", k, 1, scores.shape[1])
        width = k
    else:
        counts = _read_counts(scores, k)
        width = max(counts, default=0)
    if valid is not None:
        check_tensor("top_k_select", "valid", valid, "torch.bool", tuple(scores.shape), devices=(scores.device,))
        _check_enough(counts if counts is not None else [width] * len(valid), valid)
    kernel = find_kernel("top_k_select", "top_k_select", backend, scores)
    if kernel is not None:
        index: Tensor = kernel.launch(scores, valid, width, counts)
        return index
    found = None
    if scores.is_cpu and valid is None and counts is None:
        found = _select_distinct(scores.float(), k=width)
    return _select(scores, width, counts, valid) if found is None else found


def _select(scores: Tensor, width: int, counts: list[int] | None, valid: Tensor | None) -> Tensor:
    """The rule: sort by integers of the same order as the scores, cut off, sort by index."""
    bits = (scores.float() + 0.0).view(torch.int32)  # The negative zero becomes the positive one.
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(scores.isnan(), _LEAST + 1)
    if valid is not None:
        rank.masked_fill_(~valid, _LEAST)
    index = rank.argsort(dim=1, descending=True, stable=True)[:, :width]
    if counts is None:
        return index.sort(dim=1).values
    n_kept = torch.tensor(counts, dtype=torch.int64, device=scores.device)[:, None]
    surplus = torch.arange(width, dtype=torch.int64, device=scores.device) >= n_kept
    return index.masked_fill(surplus, scores.shape[1]).sort(dim=1).values.masked_fill_(surplus, -1)


def _select_distinct(scores: Tensor, *, k: int) -> Tensor | None:
    """The same on a CPU, several times faster, for scores of which exactly `k` reach the k-th largest of their row.

    None where that fails to hold: a tie at the threshold, or a NaN, which NumPy sorts above everything.
    """
    values = scores.numpy(force=True)
    n_rows, n = values.shape
    parted = values.copy()
    parted.partition(n - k)
    place = (values >= parted[:, n - k, None]).ravel().nonzero()[0]
    if len(place) != n_rows * k:
        return None
    index = place.reshape(n_rows, k)
    if n_rows > 1:
        index -= np.arange(0, n_rows * n, n)[:, None]
        if index[:, 0].min() < 0 or index[:, -1].max() >= n:  # One row has too many for another one.
            return None
    return torch.from_numpy(index)


def _read_counts(scores: Tensor, k: Sequence[int] | Tensor) -> list[int]:
    n_rows, n = scores.shape
    if isinstance(k, Tensor) and k.dtype == torch.int64 and k.ndim == 1:
        k = k.tolist()
    if not isinstance(k, Sequence) or isinstance(k, str) or len(k) != n_rows:
        raise OptionError(f"top_k_select needs an int, or one int for each of {n_rows} rows, as k; got {k!r}.")
    for i, count in enumerate(k):
        check_count("top_k_select", f"k of row {i}", count, 0, n)
    return list(k)


def _check_enough(counts: list[int], valid: Tensor) -> None:
    for i, (count, n_valid) in enumerate(zip(counts, valid.sum(1).tolist(), strict=True)):
        if n_valid < count:
            raise InputError(
                f"top_k_select was asked for k={count} of row {i}, which has only {n_valid} valid scores; "
                f"that row can be asked for at most {n_valid}, by one k per row."
            )
