"""From `keep` to counts: the one place that rounds."""

import math

from tokenprune.errors import OptionError


def check_keep(keep: object, *, name: str = "keep") -> None:
    """Check that `keep` is a float in (0, 1] or an int of at least 1.

    Raises:
        OptionError: it is not.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise OptionError(
            f"{name} must be a float in (0, 1] (a fraction) or an int of at least 1 (tokens per image), got {keep!r}"
        )
    if isinstance(keep, int):
        if keep < 1:
            raise OptionError(f"{name} as an int counts tokens per image and must be at least 1, got {keep}")
    elif not 0.0 < keep <= 1.0:
        raise OptionError(
            f"{name} as a float is a fraction and must lie in (0, 1], got {keep}; use an int to count tokens"
        )


def share(keep: float, n_tokens: int, *, round_down: bool = False) -> int:
    """How many of `n_tokens` tokens a share of them stands for: a fraction in [0, 1] or a count, at most all, rounded
    as in :func:`count` (or down), but 0 where it says so."""
    wanted = keep if isinstance(keep, int) else math.floor(keep * n_tokens + (1e-6 if round_down else 0.5))
    return max(0, min(int(wanted), n_tokens))


def count(keep: float, n_tokens: int) -> int:
    """How many of `n_tokens` tokens of an image `keep` stands for: at least 1, at most all.

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
    wanted = (
        "r must be an int of at least 0 (tokens removed per block), a pair (int, inflection in [-1, 1]) or a list of "
        f"ints, one per block, got {r!r}"
    )
    counts = r if isinstance(r, list) else [r]
    if isinstance(r, tuple):
        inflection = r[1] if len(r) == 2 else None
        if isinstance(inflection, bool) or not isinstance(inflection, int | float) or not -1 <= inflection <= 1:
            raise OptionError(wanted)
        counts = [r[0]]
    if not counts or any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in counts):
        raise OptionError(wanted)


def removals(r: Removal, *, n_layers: int, n_tokens: int) -> tuple[int, ...]:
    """How many tokens each of `n_layers` blocks removes of an image of `n_tokens` patches, at most half of them.

    With an inflection i the numbers run on a line from r (1 - i) in the first block to r (1 + i) in the last one,
    rounded down: -1 removes most at the beginning, 1 at the end.

    Raises:
        OptionError: `r` has more entries than there are blocks, or would remove every token.
    """
    if isinstance(r, list):
        if len(r) > n_layers:
            raise OptionError(f"r names {len(r)} blocks, but the encoder has {n_layers}")
        wanted = r + [0] * (n_layers - len(r))
    elif isinstance(r, tuple):
        steps = [0.0] if n_layers == 1 else [2 * layer / (n_layers - 1) - 1 for layer in range(n_layers)]
        wanted = [math.floor(r[0] * (1 + r[1] * step) + 1e-9) for step in steps]
    else:
        wanted = [r] * n_layers
    if sum(wanted) >= n_tokens:
        raise OptionError(
            f"r={r!r} over {n_layers} blocks would remove {sum(wanted)} of {n_tokens} patches, and at least one has to "
            f"be left; r={(n_tokens - 1) // n_layers} is the largest equal number, keep=0.5 works for every size"
        )
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
    steps = [0.0] if n_ramp == 1 else [2 * i / (n_ramp - 1) - 1 for i in range(n_ramp)]
    return (1.0,) * n_free + tuple(1.0 - (pruned + spread * step) for step in steps)
