"""The hooks of a patched model, as torch holds them: they refuse to be recorded into a graph, and copies go without.

Whether a forward is being recorded is asked in what Dynamo takes for a constant: it runs as it stands, once, while a
graph is made. Asking torch whether it compiles, in code that is compiled, would make Dynamo leave the whole frame out.
"""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._guards import TracingContext
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.hooks import RemovableHandle

from tokenprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokenprune.session import Session

_MODULE_CALL = nn.Module.__call__
_tracing, _exporting = torch._C._get_tracing_state, torch.compiler.is_exporting
_modes = torch._C._len_torch_function_stack
_NUMBERS = itertools.count()
_TOLD: set[str] = set()  # names of the copies that have said that they are copies


@dataclass(frozen=True)
class Hook:
    """A hook to be installed: `kind` is `"pre"` (before the module's forward), `"post"` (after it, also when it
    raised) or `"first"` (likewise, before the hooks that are there already)."""

    module: nn.Module
    kind: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Swap:
    """An attribute of a module to be replaced by `value` as long as the model is patched."""

    module: nn.Module
    name: str
    value: Any

    def places(self) -> list[tuple[nn.Module, str]]:
        """Where the value is now: where it was put, or inside of what was wrapped around it since (LoRA); nowhere when
        somebody has replaced it."""
        return [
            (module, name)
            for module in self.module.modules()
            for name, held in (vars(module) | module._modules).items()
            if held is self.value
        ]


class UnscriptableError(UnsupportedModelError, AttributeError):
    """torch.jit.script asks for the source of a hook; whoever else looks for a hook's name finds that it has none."""


def _refused(way: str, called: str) -> str:
    return (
        f"{way} records the forward of {called} into a graph, which cannot hold token pruning: it chooses by the "
        "values of each call, and the graph would run dense or repeat the choices made for one example; call "
        "tokenprune.unpatch(model) before tracing, scripting or exporting it, or use torch.compile, which goes "
        "together with pruning"
    )


def refuse_graph(called: str) -> None:
    """Raise where this thread records into a graph what it runs; cheap, since every hook asks.

    Args:
        called: the class of the patched model.

    Raises:
        UnsupportedModelError: it does.
    """
    if _tracing():
        way = "torch.onnx.export" if torch.onnx.is_in_onnx_export() else "torch.jit.trace"
    elif _exporting() and TracingContext.try_get() is not None:  # the flag is that of all threads
        way = "torch.export"
    elif _modes() and get_proxy_mode() is not None:
        way = "make_fx"
    else:
        return
    raise UnsupportedModelError(_refused(way, called))


def _refuse_proxies(args: tuple[Any, ...], kwargs: dict[str, Any], called: str) -> None:
    """Raise where a module is called with placeholders of values, in a trace of ``torch.fx``.

    Raises:
        UnsupportedModelError: it is.
    """
    traced = nn.Module.__call__ is not _MODULE_CALL  # a tracer wraps the call of every module as long as it runs
    values = (*args, *kwargs.values()) if traced else args[:1]
    if any(isinstance(value, Proxy) for value in values):
        raise UnsupportedModelError(_refused("torch.fx.symbolic_trace", called))


def _tell(name: str, called: str) -> None:
    """Warn, once for each copy."""
    if name not in _TOLD:
        _TOLD.add(name)
        warnings.warn(
            f"this {called} is a copy of a patched one (by copy.deepcopy, pickle or what uses them, such as "
            "torch.ao.quantization.quantize_dynamic), and copies are unpatched: it runs dense; call "
            "tokenprune.patch on the copy, or tokenprune.unpatch to leave it so",
            stacklevel=2,
        )


class CopiedHook:
    """What a hook becomes in a copy of a patched model: it does nothing but say so, once for each copy.

    Args:
        called: the class of the model.
    """

    def __init__(self, called: str) -> None:
        self.called = called
        self.name = f"copy {next(_NUMBERS)}"  # no number: Dynamo would make it a variable
        for function in (refuse_graph, _tell):  # not where they are defined, for it imports Dynamo
            torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        _tell(self.name, self.called)

    @property
    def __name__(self) -> str:
        raise UnscriptableError(
            f"torch.jit.script compiles the hooks of a model, and this {self.called} is a copy of a patched one, with "
            "idle hooks left in it; call tokenprune.unpatch(model) first"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "CopiedHook":
        return CopiedHook(self.called)

    def __reduce__(self) -> tuple[type["CopiedHook"], tuple[str]]:
        return CopiedHook, (self.called,)


def _in_copy(handle: RemovableHandle, copied: CopiedHook) -> CopiedHook:
    """Loading the handle makes torch number later hooks after it, also in a process that counts from 0 again."""
    return copied


class InstalledHook:
    """A hook in its place. It runs outside of compiled graphs and does not travel: copies and pickles of a patched
    model are unpatched.

    A graph is refused before a module runs: what hooks behind it raise, torch only warns of where another error is
    under way.

    Args:
        session: the session that installs it.
        hook: what to install.
        copied: what it becomes in a pickle.
    """

    def __init__(self, session: "Session", hook: Hook, copied: CopiedHook) -> None:
        self.session = session
        self.copied = copied
        self.called = copied.called
        self.entering = hook.kind == "pre"
        self._function = hook.function
        self._guarded = torch.compiler.disable(self._run)  # type: ignore[no-untyped-call]
        if self.entering:
            self.handle = hook.module.register_forward_pre_hook(self, with_kwargs=True)
        else:
            first = hook.kind == "first"
            self.handle = hook.module.register_forward_hook(self, with_kwargs=True, always_call=True, prepend=first)

    def __call__(self, *args: Any) -> Any:
        if self.entering:
            refuse_graph(self.called)
        return self._guarded(*args)

    def _run(self, *args: Any) -> Any:
        if self.session.idle:  # a graph compiled before calls hooks that are out
            return None
        if len(args) != (3 if self.entering else 4):
            raise UnsupportedModelError(
                f"since {self.called} was patched, another {type(args[0]).__name__} was put in the place of one of its "
                "modules and took over the hooks, but not how they are called (torch.ao.quantization does so with "
                "inplace=True); call tokenprune.unpatch(model), quantize, and then patch"
            )
        if self.entering:
            _refuse_proxies(args[1], args[2], self.called)
        return self._function(*args)

    @property
    def __name__(self) -> str:
        raise UnscriptableError(_refused("torch.jit.script", self.called))

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedHook:
        copied: CopiedHook = memo.setdefault(id(self.copied), CopiedHook(self.called))
        return copied

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[RemovableHandle, CopiedHook]]:
        return _in_copy, (self.handle, self.copied)


def sessions_on(model: nn.Module) -> list["Session"]:
    """The sessions with hooks on modules of `model`."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return list(dict.fromkeys(hook.session for hook in hooks if isinstance(hook, InstalledHook)))


def forget_idle_hooks(module: nn.Module) -> None:
    """Take out what hooks became when a patched model was copied, and those that other code has moved to `module`."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    flags = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)
    for key in [key for hooks in (before, after) for key, hook in hooks.items() if _is_idle(hook)]:
        for registry in (before, after, *flags, module._forward_hooks_always_called):
            registry.pop(key, None)


def _is_idle(hook: Any) -> bool:
    """Whether `hook` is one of ours that does nothing any more."""
    return isinstance(hook, CopiedHook) or (isinstance(hook, InstalledHook) and not hook.session.installed)
