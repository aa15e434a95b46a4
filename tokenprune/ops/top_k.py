"""Selection of the k largest scores of every row, in the order in which they stand (SpAtten's top-k engine)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenprune.errors import InputError, OptionError
from tokenprune.ops.backend import check_count, find_kernel

_SHORT = 1024  # Rows of fewer scores are sorted as fast as they are parted.
_LONG = 2048  # Rows of this many scores are worth a narrower search for their threshold, each by itself.

_Row = npt.NDArray[np.float32] | npt.NDArray[np.int32]
_Ints = npt.NDArray[np.int64]


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
    _check_scores(scores, valid)
    if scores.requires_grad:
        scores = scores.detach()
    counts = None
    if isinstance(k, int):
        check_count("top_k_select", "k", k, 1, scores.shape[1])
        width = k
    else:
        counts = _read_counts(scores, k)
        width = max(counts, default=0)
    if valid is not None:
        _check_enough(counts if counts is not None else [width] * len(valid), valid)
    kernel = find_kernel("top_k_select", "top_k_select", backend, scores)
    if kernel is not None:
        index: Tensor = kernel.launch(scores, valid, width, counts)
        return index
    if scores.is_cpu:
        return _select(scores, width, counts, valid)
    return _select_elsewhere(scores, width, counts, valid)


def _select_elsewhere(scores: Tensor, width: int, counts: list[int] | None, valid: Tensor | None) -> Tensor:
    """The rule in a few operations of any device: sort by validity and score, cut off, sort by index."""
    wide = scores.float()
    order = wide.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)
    last = wide.isnan().to(torch.int8)
    if valid is not None:
        last = last + 2 * ~valid
    order = order.gather(1, last.gather(1, order).argsort(dim=1, stable=True))[:, :width]
    if counts is None:
        return order.sort(dim=1).values
    n_kept = torch.tensor(counts, dtype=torch.int64, device=scores.device)[:, None]
    surplus = torch.arange(width, dtype=torch.int64, device=scores.device) >= n_kept
    index = order.masked_fill(surplus, scores.shape[1]).sort(dim=1).values
    return index.masked_fill(surplus, -1)


def _select(scores: Tensor, width: int, counts: list[int] | None, valid: Tensor | None) -> Tensor:
    """The rule on a CPU, without sorting the scores; NumPy's calls cost a fraction of torch's.

    A threshold is found first; that exactly `k` scores reach it proves the choice, however the threshold was come by.
    """
    wide = scores if scores.dtype is torch.float32 else scores.float()
    n_rows, n = wide.shape
    if counts is None and valid is None:
        if n_rows == 1:
            return torch.from_numpy(_choose(wide.numpy()[0], width)[None])
        if n < _LONG or 32 * width <= n < 8 * _LONG:
            index = _choose_together(wide, width)
            if index is not None:
                return torch.from_numpy(index)
    rows: npt.NDArray[np.float32] = wide.numpy()
    out = np.full((n_rows, width), -1, np.int64)
    for i, row in enumerate(rows):
        count = width if counts is None else counts[i]
        if valid is None:
            out[i, :count] = _choose(row, count)
        else:
            where = valid[i].numpy().nonzero()[0]
            out[i, :count] = where[_choose(row[where], count)]
    return torch.from_numpy(out)


def _choose_together(scores: Tensor, k: int) -> _Ints | None:
    """The choice for many short rows at once, or None where a row has a NaN or a tie that matters."""
    n_rows, n = scores.shape
    if 8 * k <= n:
        values, index = scores.topk(k + 1, dim=1, sorted=False)
        value = values.numpy()
        chosen: _Ints = index.numpy()[value > value[:, -1:]]  # as it comes, the last one is the least
        if len(chosen) != n_rows * k:
            return None
        chosen.shape = n_rows, k
        chosen.sort(axis=1)
        return chosen
    threshold = np.minimum.reduce(scores.topk(k, dim=1, sorted=False)[0].numpy(), axis=1, keepdims=True)
    place: _Ints = (scores.numpy() >= threshold).ravel().nonzero()[0]
    if len(place) != n_rows * k or np.count_nonzero(threshold != threshold):
        return None
    place.shape = n_rows, k
    place -= np.arange(0, n_rows * n, n)[:, None]
    return place


def _choose(row: _Row, k: int) -> _Ints:
    """Ascending indices of the `k` largest entries of one row."""
    if k in (0, len(row)):
        return np.arange(k)
    threshold = _threshold(row, k)
    reaches = row >= threshold
    index: _Ints = reaches.nonzero()[0]
    if len(index) < k:  # Some entry is a NaN, which counted as the largest.
        return _choose(_image(row), k)
    if len(index) > k:
        equal = (row == threshold).nonzero()[0]
        reaches[equal[k - len(index) :]] = False
        index = reaches.nonzero()[0]
    return index


def _threshold(row: _Row, k: int) -> Any:
    """The `k`-th largest entry, NaN counted as the largest or not at all.

    In a long row, two entries of a sample enclose it in all likelihood: then only what lies between them is looked at
    (Floyd and Rivest, 1975). A bad sample costs time and nothing else.
    """
    n = len(row)
    if n >= _LONG:
        sample = np.sort(row[:: round(n ** (1 / 3))])
        m = len(sample)
        middle, margin = m * (n - k) / n, 3 * (m * k * (n - k)) ** 0.5 / n + 1
        low, high = sample[max(0, int(middle - margin))], sample[min(m - 1, int(middle + margin))]
        between = row[((row >= low) & (row <= high)).nonzero()[0]]
        at = len(between) - k + int(np.count_nonzero(row > high))
        if 0 <= at < len(between):
            between.partition(at)
            return between[at]
    ordered = row.copy()
    if n < _SHORT:
        ordered.sort()
    else:
        ordered.partition(n - k)
    return ordered[n - k]


def _image(row: _Row) -> npt.NDArray[np.int32]:
    """Integers of the same order, a NaN the least of them."""
    bits = (row + np.float32(0)).view(np.int32)  # The negative zero becomes the positive one.
    image = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    image[np.isnan(row)] = np.iinfo(np.int32).min
    return image


def _check_scores(scores: Tensor, valid: Tensor | None) -> None:
    if scores.ndim != 2 or not scores.is_floating_point() or scores.shape[1] == 0:
        raise InputError(
            "top_k_select needs scores [B, N] of a float dtype with at least one entry per row; "
            f"got {scores.dtype} {list(scores.shape)}."
        )
    if valid is None:
        return
    if valid.dtype != torch.bool or valid.shape != scores.shape or valid.device != scores.device:
        raise InputError(
            f"top_k_select needs valid as torch.bool {list(scores.shape)} on {scores.device}, to go with the scores; "
            f"got {valid.dtype} {list(valid.shape)} on {valid.device}."
        )


def _read_counts(scores: Tensor, k: Sequence[int] | Tensor) -> list[int]:
    n_rows, n = scores.shape
    if isinstance(k, Tensor):
        if k.dtype != torch.int64 or k.shape != (n_rows,):
            raise OptionError(
                f"top_k_select needs an int, or one int64 per row [{n_rows}], as k; got {k.dtype} {list(k.shape)}."
            )
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
