"""What the seam asks of the map between the slots of a pruned cache and the tokens of its sequence."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class Slotted(Protocol):
    """What a pruned cache knows of its slots."""

    inside: bool
    length: int | None

    @property
    def layered(self) -> bool:
        """Whether its layers hold different tokens."""

    @property
    def differ(self) -> bool:
        """Whether its slots are not simply the tokens."""

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""

    def dropped_at(self, layer: int) -> int:
        """How many more tokens than slots there are in a layer."""

    def crop(self, n_gone: int, physical: Any) -> Callable[[], None]:
        """What forgets the last tokens; `physical` gives the length of a layer in slots."""

    def take_rows(self, rows: Tensor) -> None:
        """Keep some rows of the batch."""
