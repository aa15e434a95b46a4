"""Progress bars for what may take more than a few seconds; nothing where nobody watches."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
DELAY_S = 3.0


def progress(items: Sequence[Item], *, label: str) -> Iterable[Item]:
    """`items` with a bar on stderr that appears after three seconds; silent where stderr is not a terminal, or without
    tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(items, desc=label, disable=None, delay=DELAY_S, leave=False)
    return bar
