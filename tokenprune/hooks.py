"""The hooks of a patched model, as torch holds them: they refuse to be recorded into a graph, and copies go without.

Whether a forward is being recorded is asked in what Dynamo takes for a constant: it runs as it stands, once, while a
graph is made. Asking torch whether it compiles, in code that is compiled, would make Dynamo leave the whole frame out.
"""

import itertools
import warnings
import weakref
from collections.abc import Callable
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


def refuse_proxies(args: tuple[Any, ...], kwargs: dict[str, Any], called: str) -> None:
    """Raise where a module is called with what stands for a value in a trace of ``torch.fx``.

    Args:
        args: what the module is called with.
        kwargs: and by name.
        called: the class of the patched model.

    Raises:
        UnsupportedModelError: it is.
    """
    if nn.Module.__call__ is _MODULE_CALL and not (args and isinstance(args[0], Proxy)):
        return  # a tracer wraps the call of every module as long as it runs
    for values in (args, kwargs.values()):
        for value in values:
            if isinstance(value, Proxy):
                raise UnsupportedModelError(_refused("torch.fx.symbolic_trace", called))


def moved(module: nn.Module, called: str) -> UnsupportedModelError:
    """The error to raise where a hook was called without what it was registered to get.

    Args:
        module: the module that it stands on now.
        called: the class of the patched model.
    """
    return UnsupportedModelError(
        f"since {called} was patched, another {type(module).__name__} was put in the place of one of its modules and "
        "took over the hooks, but not how they are called (torch.ao.quantization does so with inplace=True); call "
        "tokenprune.unpatch(model), quantize, and then patch"
    )


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


def _in_copy(handle: RemovableHandle | None, copied: CopiedHook) -> CopiedHook:
    """Loading the handle makes torch number later hooks after it, also in a process that counts from 0 again."""
    return copied


class InstalledHook:
    """A hook that knows its session and does not travel: copies and pickles of a patched model are unpatched.

    Args:
        session: the session, which is not kept alive.
        function: what the hook does.
        copied: what it becomes in a pickle.
        entering: whether it is called before a module runs, which is when a graph is refused: what hooks behind it
            raise, torch only warns of where another error is under way.
    """

    def __init__(self, session: "Session", function: Callable[..., Any], copied: CopiedHook, *, entering: bool) -> None:
        self.session = weakref.ref(session)
        self.function = function
        self.copied = copied
        self.called = copied.called
        self.entering = entering
        self.handle: RemovableHandle | None = None

    def __call__(self, *args: Any) -> Any:
        if self.entering:
            refuse_graph(self.called)
        return self.function(*args)

    @property
    def __name__(self) -> str:
        raise UnscriptableError(_refused("torch.jit.script", self.called))

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedHook:
        copied: CopiedHook = memo.setdefault(id(self.copied), CopiedHook(self.called))
        return copied

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[RemovableHandle | None, CopiedHook]]:
        return _in_copy, (self.handle, self.copied)
