"""Asking a method at a site: the one place that checks what methods answer.

Adapters and :func:`tokenprune.testing.check_method` ask through these functions, so a wrong answer gets the same error
everywhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import InputError
from tokenprune.methods.base import Method
from tokenprune.reduction import Keep, Merge, Reduction
from tokenprune.signals import Budget, Signals


def ask_before_llm(method: Method, signals: Signals) -> Reduction:
    """What `method` makes of images of one size, see :func:`ask`. A fraction also counts the tokens that the attention
    mask hides.

    Raises:
        InputError: the answer does not fit.
    """
    n_tokens = signals.features.shape[1]
    budget = method.budget(n_tokens + signals.n_hidden)
    budget = Budget(min(budget.low, n_tokens), min(budget.high, n_tokens))
    return ask(method, "before_llm", signals, budget, shape=signals.features.shape)


def ask(
    method: Method, site: str, signals: Any, budget: Budget, *, shape: Sequence[int], n_prefix: int = 0
) -> Reduction:
    """What `method` answers at `site`, checked. A `Keep` is handed over on the CPU, except inside an encoder.

    Inside an encoder nothing but shapes is checked on a GPU: each block would wait for the device.

    Args:
        method: the method.
        site: the site, at which the method takes part.
        signals: what the method is given.
        budget: how many tokens of each row it has to keep.
        shape: rows and tokens that are reduced, B and N.
        n_prefix: how many tokens at the beginning of each row have to be kept as they are (class, registers).

    Raises:
        InputError: the answer is no reduction of B rows of N tokens within the budget.
    """
    answer = getattr(method, site)(signals, budget)
    n_rows, n_tokens = shape[:2]
    layer = getattr(signals, "layer", None)
    who = f"method {method.name!r} at site {site!r}{'' if layer is None else f' (layer {layer})'} returned"
    kind = "a Keep" if site == "llm_layer" else "a Keep or a Merge"
    due = f"{kind} of {n_rows} rows of {budget.low} to {budget.high} of {n_tokens} tokens were due"
    inside = site == "encoder_block"
    if not isinstance(answer, Keep if site == "llm_layer" else Keep | Merge):
        raise InputError(f"{who} {type(answer).__name__}; {due}")
    index, valid = answer.index, answer.valid
    if valid is not None and inside:
        raise InputError(f"{who} {type(answer).__name__} with gaps; {due}, in rows of one length")
    fits = index.ndim == 2 and len(index) == n_rows and budget.low <= index.shape[1] <= budget.high
    if not fits or index.dtype != torch.int64 or (valid is not None and valid.shape != index.shape):
        found = f"an index of {index.dtype} and shape {list(index.shape)}"
        raise InputError(f"{who} {found}; {due}, in int64, and valid of that shape or None")
    if isinstance(answer, Merge) and (answer.assign.shape != (n_rows, n_tokens) or answer.assign.dtype != torch.int64):
        raise InputError(f"{who} groups {answer.assign.dtype} {list(answer.assign.shape)}; {due}")
    if inside and index.device.type != "cpu":
        return answer
    index, valid = index.cpu(), None if valid is None else valid.cpu()
    _check_positions(index, valid, who=who, budget=budget, n_tokens=n_tokens, n_prefix=n_prefix)
    if isinstance(answer, Keep):
        return Keep(index, valid, answer.radius)
    groups, slots = answer.assign.cpu().numpy(), np.arange(index.shape[1])
    own = (np.take_along_axis(groups, index.numpy(), 1) == slots).all()
    patches = groups[:, n_prefix:]
    if not own or (patches < n_prefix).any() or (patches >= len(slots)).any():
        raise InputError(f"{who} groups that do not stand at tokens of their own, or merge a class token; {due}")
    return answer


def _check_positions(
    index: Tensor, valid: Tensor | None, *, who: str, budget: Budget, n_tokens: int, n_prefix: int
) -> None:
    """Check `index` `[B, M]`, of which the slots in `valid` `[B, M]` count, both on the CPU.

    Raises:
        InputError: the positions of a row are not within the budget, not ascending or not those of tokens.
    """
    places = index.numpy()  # several times faster than torch on so few numbers
    counts = np.ones_like(places, dtype=bool) if valid is None else valid.numpy()
    so_far = np.maximum.accumulate(np.where(counts, places, -1), axis=1)
    rising = np.diff(so_far, axis=1, prepend=-1) > 0
    fits = ((rising & (places < n_tokens)) | ~counts).all(1) & (counts.sum(1) >= budget.low)
    if n_prefix:
        fits &= places[:, n_prefix - 1] == n_prefix - 1  # ascending from 0, so none is missing before it
    if fits.all():
        return
    row = int(fits.argmin())
    prefix = f", the first {n_prefix} (class, distillation, registers) among them," if n_prefix else ""
    raise InputError(
        f"{who} {places[row][counts[row]].tolist()} for row {row}; {budget.low} to {budget.high} distinct ascending "
        f"positions below {n_tokens}{prefix} were due"
    )
