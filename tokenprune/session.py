"""The session: the only stateful thing. It installs hooks, takes them out again, and holds the traces of the last
forward.

It is what an adapter works with: which methods take part at a site (by their base class; adapters know no particular
method), whether to prune now, and where traces go.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenprune.hooks import CopiedHook, Hook, InstalledHook, Swap
from tokenprune.methods.base import Method
from tokenprune.signals import Trace, Traffic

if TYPE_CHECKING:
    from tokenprune.report.report import Report

_PAUSED: ContextVar[frozenset[int]] = ContextVar("tokenprune_paused", default=frozenset())
_SUSPENDED: ContextVar[frozenset[int]] = ContextVar("tokenprune_suspended", default=frozenset())


class Session:
    """A patched model. Made by :func:`tokenprune.patch`; as a context manager it unpatches when the block is left.

    Attributes:
        model: the model, as it was given to ``patch``.
        methods: the methods, in order.
        family: name of the model's family.
        positions: `"original"` or `"packed"`.
        forced: whether tokens go through the gathering code even where all are kept (for tests).
        traces: what happened at each site in the last prompt. Decoding steps leave it as it was, and so do later calls
            of several tokens that continue it without an image, such as those that verify drafts.
        later_traces: what happened since in each call of several tokens that continued the last prompt without an
            image.
    """

    def __init__(
        self, model: nn.Module, methods: tuple[Method, ...], family: str, *, positions: str = "original"
    ) -> None:
        self.model = model
        self.methods = methods
        self.family = family
        self.positions = positions
        self.forced = False
        self.traces: tuple[Trace, ...] = ()
        self.later_traces: tuple[tuple[Trace, ...], ...] = ()
        self._traffic: Callable[[], Traffic] | None = None
        self._remarks: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._swapped: list[tuple[Swap, Any]] = []  # with what was there before
        self._copied = CopiedHook(type(model).__name__)
        self._pauses: list[None] = []  # one for each block that pauses all threads; a list changes in one step

    @property
    def installed(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    @property
    def idle(self) -> bool:
        """Whether hooks do nothing: they are out, or suspended in this thread."""
        return not self._handles or id(self) in _SUSPENDED.get()

    @property
    def active(self) -> bool:
        """Whether new pruning takes place: False within :meth:`pause`, in the threads that it holds for."""
        return not self._pauses and id(self) not in _PAUSED.get()

    @property
    def traffic(self) -> Traffic | None:
        """Bytes of keys and values read by the last generation so far; None where no method counts them."""
        return None if self._traffic is None else self._traffic()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the report has to say about the model itself, and about calls after the last prompt."""
        if not self.later_traces:
            return tuple(self._remarks)
        pruned = sum(sum(trace.n_in) - sum(trace.n_out) for call in self.later_traces for trace in call)
        later = f"{len(self.later_traces)} later calls of several tokens continued this prompt without an image"
        return (*self._remarks, f"{later}; {pruned} tokens were pruned in them.")

    def remark(self, sentence: str) -> None:
        """Have the report say `sentence` (called by adapters while they make their hooks)."""
        self._remarks.append(sentence)

    def publish_traffic(self, traffic: Callable[[], Traffic]) -> None:
        """Have `traffic` say what the last generation read (called by adapters)."""
        self._traffic = traffic

    def publish(self, traces: tuple[Trace, ...]) -> None:
        """Make `traces` those of the last prompt (called by adapters)."""
        self.traces, self.later_traces = traces, ()

    def publish_later(self, traces: tuple[Trace, ...]) -> None:
        """Add `traces` of a call that continues the last prompt (called by adapters)."""
        self.later_traces = (*self.later_traces, traces)

    def methods_at(self, site: str) -> tuple[Method, ...]:
        """The methods that take part at `site`, in order."""
        return tuple(method for method in self.methods if site in method.sites())

    def install(self, hooks: Sequence[Hook | Swap]) -> None:
        """Put what an adapter wants in place: all of it or, when that raises, nothing."""
        try:
            for one in hooks:
                if isinstance(one, Hook):
                    self.add([one])
                else:
                    self._swapped.append((one, getattr(one.module, one.name)))
                    setattr(one.module, one.name, one.value)
        except BaseException:
            self.remove()
            raise

    def add(self, hooks: list[Hook]) -> None:
        """Put hooks in place (also called by adapters where it turns out late that they are needed)."""
        for hook in hooks:
            self._handles.append(InstalledHook(self, hook, self._copied).handle)

    def remove(self) -> None:
        """Take the hooks out. The model is as it was before, but for what others have put in since; calling it again
        does nothing."""
        while self._handles:
            self._handles.pop().remove()
        while self._swapped:
            swap, original = self._swapped.pop()
            for module, name in swap.places():
                setattr(module, name, original)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the block the model is as if it was not patched: it has its own attributes, and in this thread hooks
        do nothing (called while patching)."""
        swapped = [(place, swap.value, original) for swap, original in self._swapped for place in swap.places()]
        token = _SUSPENDED.set(_SUSPENDED.get() | {id(self)})
        try:
            for place, _, original in swapped:
                setattr(*place, original)
            yield
        finally:
            for place, value, _ in swapped:
                setattr(*place, value)
            _SUSPENDED.reset(token)

    @contextmanager
    def pause(self, *, all_threads: bool = False) -> Iterator[None]:
        """Run without new pruning until the block is left. Caches that are pruned already stay so.

        Args:
            all_threads: also in other threads, such as one that runs ``generate`` while this one reads a
                ``TextIteratorStreamer``. By default in this thread alone, so that others keep pruning.
        """
        if all_threads:
            self._pauses.append(None)
            resume = self._pauses.pop
        else:
            resume = partial(_PAUSED.reset, _PAUSED.set(_PAUSED.get() | {id(self)}))
        try:
            yield
        finally:
            resume()

    def report(self, inputs: dict[str, Any] | None = None, *, max_new_tokens: int = 16, repeats: int = 5) -> "Report":
        """What was pruned; with `inputs` also what it saved, measured by running dense and pruned in alternation.

        Args:
            inputs: keyword arguments of the model's ``generate``. None: only what the last forward left.
            max_new_tokens: tokens to generate in each measured run.
            repeats: measured runs of each kind.

        Returns:
            A :class:`tokenprune.Report`.

        Raises:
            OptionError: an argument is out of range or `inputs` holds no tensor.
        """
        from tokenprune.report import report

        return report.build(self, inputs, max_new_tokens=max_new_tokens, repeats=repeats)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        methods = ", ".join(map(repr, self.methods))
        return f"Session({self.family}, [{methods}], positions={self.positions!r}, installed={self.installed})"
