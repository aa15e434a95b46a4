"""The session: the only stateful thing. It installs hooks, takes them out again, and holds the traces of the last
forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenprune.engine import Adapter, Hook, LayerReducer, Reducer, Swap
from tokenprune.hooks import CopiedHook, InstalledHook, moved, refuse_proxies
from tokenprune.methods.base import Method
from tokenprune.signals import Trace, Traffic
from tokenprune.validate import CheckedLayerReducer, CheckedReducer

if TYPE_CHECKING:
    from tokenprune.report.report import Report

_PAUSED: ContextVar[frozenset[int]] = ContextVar("tokenprune_paused", default=frozenset())
_SUSPENDED: ContextVar[frozenset[int]] = ContextVar("tokenprune_suspended", default=frozenset())


class Session:
    """A patched model. Made by :func:`tokenprune.patch`; as a context manager it unpatches when the block is left.

    Attributes:
        model: the model, as it was given to ``patch``.
        methods: the methods, in order.
        positions: `"original"` or `"packed"`.
        family: name of the model's family.
    """

    def __init__(
        self, model: nn.Module, methods: tuple[Method, ...], adapter: Adapter, *, positions: str = "original"
    ) -> None:
        self.model = model
        self.methods = methods
        self.positions = positions
        self.forced = False
        self._adapter = adapter
        self._handles: list[RemovableHandle] = []
        self._swapped: list[tuple[Swap, Any]] = []
        self._planned: list[Hook | Swap] | None = None
        self._copied = CopiedHook(type(model).__name__)
        self._pauses: list[None] = []  # one for each block that pauses all threads; a list changes in one step
        self._traces: tuple[Trace, ...] = ()
        self._later: tuple[tuple[Trace, ...], ...] = ()
        self._traffic: Callable[[], Traffic] | None = None
        self._remarks: tuple[str, ...] = ()
        self._reducers = {
            site: tuple(CheckedReducer(method, site) for method in methods if site in method.sites())
            for method in methods
            for site in method.sites()
            if site != "llm_layer"
        }
        self._layer_reducers = tuple(CheckedLayerReducer(method) for method in methods if "llm_layer" in method.sites())

    @property
    def family(self) -> str:
        """Name of the model's family."""
        return self._adapter.family

    @property
    def installed(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    @property
    def active(self) -> bool:
        """Whether new pruning takes place: False within :meth:`pause`, in the threads that it holds for."""
        return not self._pauses and id(self) not in _PAUSED.get()

    @property
    def traces(self) -> tuple[Trace, ...]:
        """What happened at each site in the last prompt. Decoding steps leave it as it was, and so do later calls of
        several tokens that go on from it without an image, such as those that verify drafts."""
        return self._traces

    @property
    def later_traces(self) -> tuple[tuple[Trace, ...], ...]:
        """What happened since in each call of several tokens that went on from the last prompt without an image."""
        return self._later

    @property
    def traffic(self) -> Traffic | None:
        """Bytes of keys and values read by the last generation so far; None where no method counts them."""
        return None if self._traffic is None else self._traffic()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the report has to say about the model itself, and about calls after the last prompt."""
        if not self._later:
            return self._remarks
        left = sum(sum(trace.n_in) - sum(trace.n_out) for call in self._later for trace in call)
        later = f"{len(self._later)} later calls of several tokens went on from this prompt without an image"
        return (*self._remarks, f"{later}; {left} tokens were pruned in them.")

    def remark(self, sentence: str) -> None:
        """Have the report say `sentence` (called by adapters while planning)."""
        self._remarks = (*self._remarks, sentence)

    def publish_traffic(self, traffic: Callable[[], Traffic]) -> None:
        """Make what `traffic` gives that of the last generation (called by adapters)."""
        self._traffic = traffic

    def publish(self, traces: tuple[Trace, ...]) -> None:
        """Make `traces` those of the last prompt (called by adapters)."""
        self._traces, self._later = traces, ()

    def publish_later(self, traces: tuple[Trace, ...]) -> None:
        """Add `traces` of a call that goes on from the last prompt (called by adapters)."""
        self._later = (*self._later, traces)

    def reducers(self, site: str) -> tuple[Reducer, ...]:
        """The methods that take part at `site`, in order (called by adapters)."""
        return self._reducers.get(site, ())

    def layer_reducers(self) -> tuple[LayerReducer, ...]:
        """The methods that take part after decoder layers, in order (called by adapters)."""
        return self._layer_reducers

    def plan(self) -> None:
        """Find out what has to be installed; touches nothing.

        Raises:
            OptionError: the model cannot honour what the methods ask for.
        """
        self._remarks = ()
        self._planned = self._adapter.hooks(self)

    def install(self) -> None:
        """Put the hooks in place: all of them or, when that raises, none."""
        if self._planned is None:
            self.plan()
        try:
            for hook in self._planned or ():
                if isinstance(hook, Swap):
                    self._swapped.append((hook, getattr(hook.module, hook.name)))
                    setattr(hook.module, hook.name, hook.value)
                else:
                    self.add([hook])
        except BaseException:
            self.remove()
            raise
        finally:
            self._planned = None

    def add(self, hooks: list[Hook]) -> None:
        """Put hooks in place (called by adapters where it turns out late that they are needed)."""
        register: dict[str, Callable[..., RemovableHandle]] = {
            "pre": lambda module, hook: module.register_forward_pre_hook(hook, with_kwargs=True),
            "post": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True, always_call=True),
            "first": lambda module, hook: module.register_forward_hook(
                hook, with_kwargs=True, always_call=True, prepend=True
            ),
        }
        for hook in hooks:
            before = hook.kind == "pre"
            ours = InstalledHook(self, self._guarded(hook.function, entering=before), self._copied, entering=before)
            ours.handle = register[hook.kind](hook.module, ours)
            self._handles.append(ours.handle)

    def _guarded(self, function: Callable[..., Any], *, entering: bool) -> Callable[..., Any]:
        """`function` outside of any compiled graph, and idle once the hooks are out: a graph compiled before has
        them. Where it is called `entering` a module, that may be in a trace of torch.fx."""
        called, n_args = type(self.model).__name__, 3 if entering else 4

        def call(*args: Any) -> Any:
            if not self._handles or id(self) in _SUSPENDED.get():
                return None
            if len(args) != n_args:
                raise moved(args[0], called)
            if entering:
                refuse_proxies(args[1], args[2], called)
            return function(*args)

        guarded: Callable[..., Any] = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
        return guarded

    def remove(self) -> None:
        """Take the hooks out. The model is as it was before, but for what others have put in since; calling it again
        does nothing."""
        while self._handles:
            self._handles.pop().remove()
        while self._swapped:
            swap, original = self._swapped.pop()
            for module, name in _places(swap):
                setattr(module, name, original)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Within the block the model has its own modules and attributes again; the hooks stay."""
        places = [(place, swap.value, original) for swap, original in self._swapped for place in _places(swap)]
        try:
            for (module, name), _, original in places:
                setattr(module, name, original)
            yield
        finally:
            for (module, name), value, _ in places:
                setattr(module, name, value)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the block, in this thread, the model runs as if the session were not there (called while patching)."""
        token = _SUSPENDED.set(_SUSPENDED.get() | {id(self)})
        try:
            with self.lifted():
                yield
        finally:
            _SUSPENDED.reset(token)

    @contextmanager
    def pause(self, *, all_threads: bool = False) -> Iterator[None]:
        """Run without new pruning until the block is left. Caches that are pruned already go on.

        Args:
            all_threads: also in other threads, such as one that runs ``generate`` while this one reads a
                ``TextIteratorStreamer``. By default in this thread alone, so that others go on pruning.
        """
        if all_threads:
            self._pauses.append(None)
            try:
                yield
            finally:
                self._pauses.pop()
            return
        token = _PAUSED.set(_PAUSED.get() | {id(self)})
        try:
            yield
        finally:
            _PAUSED.reset(token)

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


def _places(swap: Swap) -> list[tuple[nn.Module, str]]:
    """Where the value of a swap stands now: where it was put, or inside of what was wrapped around it since; nowhere
    when somebody has replaced it."""
    if not isinstance(swap.value, nn.Module):
        return [(swap.module, swap.name)] if getattr(swap.module, swap.name, None) is swap.value else []
    return [
        (module, name)
        for module in swap.module.modules()
        for name, child in module._modules.items()
        if child is swap.value
    ]


def _registries(module: nn.Module) -> tuple[tuple[dict[int, Any], ...], ...]:
    """Where torch keeps the hooks of a module, each kind followed by its flags."""
    return (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
    )


def forget_copied_hooks(module: nn.Module) -> None:
    """Take out what hooks became when a patched model was copied, and those that other code has moved to `module`."""
    for hooks, *flags in _registries(module):
        for key in [key for key, hook in hooks.items() if _is_idle(hook)]:
            for registry in (hooks, *flags):
                registry.pop(key, None)


def _is_idle(hook: Any) -> bool:
    """Whether it is one of ours that does nothing any more."""
    if isinstance(hook, InstalledHook):
        return (session := hook.session()) is None or not session.installed
    return isinstance(hook, CopiedHook)


def session_of(module: nn.Module) -> Session | None:
    """The session whose hooks sit on `module`, None where there is none."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, InstalledHook):
            session: Session | None = hook.session()
            return session
    return None
