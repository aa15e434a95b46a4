"""What an adapter is and what it may ask of the session that installs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from tokenprune.reduction import Reduction
from tokenprune.signals import AttentionPlan, CachePlan, LayerSignals, Probe, Signals, Stage, TextGuard, Trace, Traffic


class Reducer(Protocol):
    """A method at one site, with its `keep` turned into counts."""

    @property
    def name(self) -> str:
        """Name of the method."""
        ...

    @property
    def biased(self) -> bool:
        """Whether attention is to see how many tokens each group has that it merges."""
        ...

    def __call__(self, signals: Signals) -> Reduction:
        """Select or merge tokens of `signals.features` `[B, N, D]`."""
        ...


class LayerReducer(Protocol):
    """A method that takes part after decoder layers, with its shares turned into counts."""

    @property
    def name(self) -> str:
        """Name of the method."""
        ...

    @property
    def probe(self) -> Probe | None:
        """The importance scores that it looks at."""
        ...

    @property
    def text(self) -> TextGuard | None:
        """Which text stays where it drops text too."""
        ...

    def schedule(self, n_layers: int) -> tuple[Stage, ...]:
        """After which layers it drops tokens."""
        ...

    def attention_plan(self, n_layers: int) -> AttentionPlan | None:
        """What it leaves out of every attention."""
        ...

    def cache_plan(self, n_layers: int) -> CachePlan | None:
        """What it takes out of the KV cache while tokens are generated."""
        ...

    def count(self, stage: Stage, n_tokens: int) -> int:
        """How many of the `n_tokens` visual tokens of a row that entered the decoder go on after `stage`."""
        ...

    def __call__(self, signals: LayerSignals, *, n_keep: int) -> Tensor:
        """Positions `[R, n_keep]` among the tokens of `signals.importance` `[R, N]` that go on, ascending."""
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

    def layer_reducers(self) -> tuple[LayerReducer, ...]:
        """The methods that take part after decoder layers, in order."""
        ...

    def remark(self, sentence: str) -> None:
        """Have the report say `sentence`, which was found out while planning."""
        ...

    def add(self, hooks: list["Hook"]) -> None:
        """Put further hooks in place while the model runs."""
        ...

    def publish_traffic(self, traffic: Traffic) -> None:
        """Make `traffic` what was read while the last tokens were generated."""
        ...

    def publish(self, traces: tuple[Trace, ...]) -> None:
        """Make `traces` those of the last prompt."""
        ...

    def publish_later(self, traces: tuple[Trace, ...]) -> None:
        """Add `traces` of a call of several tokens that goes on from the last prompt and brings no image."""
        ...


@dataclass(frozen=True)
class Hook:
    """One hook to be installed: `kind` is `"pre"` (before the module's forward), `"post"` (after it, also when it
    raised) or `"first"` (likewise, before the hooks that are there already)."""

    module: nn.Module
    kind: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Swap:
    """One attribute of a module to be replaced by `value` as long as the hooks are in place."""

    module: nn.Module
    name: str
    value: Any


class Adapter(Protocol):
    """One family of models: where its sites are, how signals are read and reductions written."""

    @property
    def family(self) -> str:
        """Name of the family."""
        ...

    def preflight(self, *, sites: tuple[str, ...], positions: str) -> None:
        """Raise unless the model can honour what is asked; touches nothing."""
        ...

    def hooks(self, engine: Engine) -> list[Hook | Swap]:
        """What makes `engine` act on the model; touches nothing.

        Raises:
            OptionError: the model cannot honour what the methods ask for.
        """
        ...
