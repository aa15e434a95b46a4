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


def count(keep: float, n_tokens: int) -> int:
    """How many of `n_tokens` tokens of an image `keep` stands for: at least 1, at most all.

    A fraction is rounded half up (0.098 of 576 is 56), so that the count is monotonic in both arguments.
    """
    wanted = keep if isinstance(keep, int) else math.floor(keep * n_tokens + 0.5)
    return max(1, min(int(wanted), n_tokens))
