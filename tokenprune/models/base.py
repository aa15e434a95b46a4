"""What an adapter is and what it may ask of the session that installs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from tokenprune.reduction import Keep
from tokenprune.signals import Signals, Trace


class Reducer(Protocol):
    """A method at one site, with its `keep` turned into counts."""

    @property
    def name(self) -> str:
        """Name of the method."""
        ...

    def __call__(self, signals: Signals) -> Keep:
        """Select tokens of `signals.features` `[B, N, D]`."""
        ...


class Engine(Protocol):
    """The session, as an adapter sees it."""

    @property
    def active(self) -> bool:
        """Whether new pruning takes place (False while paused)."""
        ...

    @property
    def forced(self) -> bool:
        """Whether tokens go through the gathering code even where all are kept (for tests)."""
        ...

    @property
    def positions(self) -> str:
        """`"original"` or `"packed"`."""
        ...

    def reducers(self, site: str) -> tuple[Reducer, ...]:
        """The methods that take part at `site`, in order."""
        ...

    def publish(self, traces: tuple[Trace, ...]) -> None:
        """Make `traces` those of the last forward."""
        ...


@dataclass(frozen=True)
class Hook:
    """One hook to be installed: `kind` is `"pre"` (before the module's forward) or `"post"` (after it, also when it
    raised)."""

    module: nn.Module
    kind: str
    function: Callable[..., Any]


class Adapter(Protocol):
    """One family of models: where its sites are, how signals are read and reductions written."""

    @property
    def family(self) -> str:
        """Name of the family."""
        ...

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Modules that get hooks."""
        ...

    def preflight(self, *, sites: tuple[str, ...], positions: str) -> None:
        """Raise unless the model can honour what is asked; touches nothing."""
        ...

    def hooks(self, engine: Engine) -> list[Hook]:
        """The hooks that make `engine` act on the model."""
        ...
