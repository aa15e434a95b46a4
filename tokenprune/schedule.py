"""From `keep` to counts: the one place that rounds."""

import math
from typing import Any, TypeGuard

from tokenprune.errors import OptionError


def is_int(value: object) -> TypeGuard[int]:
    """Whether `value` is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is an int or a float and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_keep(keep: object, *, name: str = "keep") -> None:
    """Check that `keep` is a float in (0, 1] or an int of at least 1.

    Raises:
        OptionError: it is not.
    """
    if not is_number(keep):
        raise OptionError(
            f"{name} must be a float in (0, 1] (a fraction) or an int of at least 1 (tokens per image), got {keep!r}"
        )
    if isinstance(keep, int) and keep < 1:
        raise OptionError(f"{name} as an int counts tokens per image and must be at least 1, got {keep}")
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        raise OptionError(
            f"{name} as a float is a fraction and must lie in (0, 1], got {keep}; use an int to count tokens"
        )


def share(keep: float, n_tokens: int, *, round_down: bool = False) -> int:
    """How many of `n_tokens` tokens `keep` means: a fraction in [0, 1] of them or a count, at most all, rounded as in
    :func:`count` (or down); unlike there, it may be 0."""
    wanted = keep if isinstance(keep, int) else math.floor(keep * n_tokens + (1e-6 if round_down else 0.5))
    return max(0, min(int(wanted), n_tokens))


def count(keep: float, n_tokens: int) -> int:
    """How many of `n_tokens` tokens of an image `keep` means: at least 1, at most all.

    A fraction is rounded half up (0.098 of 576 is 56), so that the count is monotonic in both arguments.
    """
    return max(1, share(keep, n_tokens))


Removal = int | tuple[int, float] | list[int]
"""Tokens removed per encoder block: a number, a number with an inflection in [-1, 1], or a list with one per block."""


def check_removal(r: object) -> None:
    """Check that `r` is a :data:`Removal`.

    Raises:
        OptionError: it is not.
    """
    counts: list[object] = r if isinstance(r, list) else [r]
    inflection: Any = 0.0
    if isinstance(r, tuple) and len(r) == 2:
        counts, inflection = [r[0]], r[1]
    in_range = is_number(inflection) and -1 <= inflection <= 1
    if not in_range or not counts or not all(is_int(one) and one >= 0 for one in counts):
        raise OptionError(
            "r must be an int of at least 0 (tokens removed per block), a pair (int, inflection in [-1, 1]) or a list "
            f"of ints, one per block, got {r!r}"
        )


def removals(r: Removal, *, n_layers: int, n_tokens: int) -> tuple[int, ...]:
    """How many tokens each of `n_layers` blocks removes of an image of `n_tokens` patches, at most half of those that
    reach it, so that one is left in any case.

    With an inflection i the numbers run on a line from r (1 - i) in the first block to r (1 + i) in the last one,
    rounded down: -1 removes most at the beginning, 1 at the end.

    Raises:
        OptionError: `r` has more entries than there are blocks.
    """
    if isinstance(r, list):
        if len(r) > n_layers:
            raise OptionError(f"r names {len(r)} blocks, but the encoder has {n_layers}")
        wanted = r + [0] * (n_layers - len(r))
    else:
        mean, inflection = r if isinstance(r, tuple) else (r, 0.0)
        wanted = [math.floor(mean * (1 + inflection * step) + 1e-9) for step in _line(n_layers)]
    found = []
    for one in wanted:
        found.append(min(one, n_tokens // 2))
        n_tokens -= found[-1]
    return tuple(found)


def removals_for(keep: float, *, n_layers: int, n_tokens: int) -> tuple[int, ...]:
    """How many tokens each of `n_layers` blocks removes so that `keep` of `n_tokens` patches are left after the last.

    The numbers are as equal as they can be, larger ones first; no block removes more than half of what reaches it.

    Raises:
        OptionError: so few cannot be reached in so many blocks.
    """
    wanted = count(keep, n_tokens)
    least = _halved(n_tokens, n_layers)
    if wanted < least:
        raise OptionError(
            f"keep={keep!r} leaves {wanted} of {n_tokens} patches, but {n_layers} blocks that each remove at most half "
            f"leave {least}; keep={least} or more works here"
        )
    found = []
    for left in range(n_layers, 0, -1):
        r = min(-(-(n_tokens - wanted) // left), n_tokens // 2)
        while _halved(n_tokens - r, left - 1) > wanted:
            r += 1
        found.append(r)
        n_tokens -= r
    return tuple(found)


def _halved(n_tokens: int, times: int) -> int:
    """What is left of `n_tokens` after half of them, rounded down, was removed so many times."""
    return max(1, -(-n_tokens >> times)) if n_tokens else 0


def ramp(average: float, *, n_layers: int, free: float) -> tuple[float, ...]:
    """Fractions kept by each layer that are `average` in the mean and fall with depth (SpAtten, section V-A).

    The first `free` of the layers (at least one) keep everything. From there on what is pruned grows linearly, from
    half of its mean to one and a half times it where that leaves something, so that the two ends add up to twice the
    mean.

    Raises:
        OptionError: so few cannot be reached.
    """
    n_free = max(1, math.floor(free * n_layers + 0.5))
    n_ramp = n_layers - n_free
    pruned = (1.0 - average) * n_layers / n_ramp if n_ramp else 0.0
    if pruned >= 1.0 or (average < 1.0 and not n_ramp):
        raise OptionError(
            f"an average of {average} cannot be kept over {n_layers} layers whose first {n_free} keep "
            f"everything: more than {n_free / n_layers:.3g} is needed"
        )
    spread = min(pruned / 2, 0.98 - pruned) if pruned < 0.98 else 0.0
    return (1.0,) * n_free + tuple(1.0 - (pruned + spread * step) for step in _line(n_ramp))


def _line(n: int) -> list[float]:
    """`n` numbers on a line from -1 to 1."""
    return [0.0] if n == 1 else [2 * i / (n - 1) - 1 for i in range(n)]
