"""Attention modules of text decoders: how they are found, how their function is replaced, what it is called with.

transformers keeps a table of attention functions. A probed attention module sees a name of ours as its implementation
through a proxy config; everyone else (the masks above all) sees the configuration itself.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenprune.upstream.calls import names_of
from tokenprune.upstream.check import look_up, missing, need, need_attributes

NAME = "tokenprune"
_FIELD = "config"
_EAGER = "eager_attention_forward"
_GROUPS = "num_key_value_groups"
_QUERY, _OUTPUT = "q_proj", "o_proj"
PROJECTIONS = (_QUERY, _OUTPUT)
"""Names of the projections of queries and of the output in an attention module."""
_OTHER_PROJECTIONS = ("k_proj", "v_proj")
_COUNTED = {"num_heads", "num_attention_heads", "n_heads", "hidden_size", "embed_dim", "num_key_value_groups"}
_BESIDE_MASK = ("softcap", "position_bias", "cache", "s_aux")  # what may change an attention beside its mask


class ProxyConfig:
    """A configuration as a probed attention module sees it. Copies and pickles are the configuration itself."""

    _attn_implementation = NAME

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "original":
            raise AttributeError(name)
        return getattr(self.original, name)

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _itself, (self.original,)


def _itself(original: Any) -> Any:
    return original


class RegroupedAttention:
    """An attention module as its attention function sees it when each key serves another number of queries."""

    def __init__(self, module: nn.Module, n_groups: int) -> None:
        self.module = module
        self.num_key_value_groups = n_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def check_grouping(module: nn.Module, n_groups: int) -> None:
    """Check that an attention whose keys serve `n_groups` queries each knows so under the name that is known.

    Raises:
        UnsupportedModelError: it does not.
    """
    if n_groups > 1:
        need_attributes(module, [_GROUPS], role="number of queries of each key")


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The module of a decoder layer whose attention can be probed; None where there is none (linear attention)."""
    modules = (module for module in layer.modules() if hasattr(module, _FIELD) and hasattr(module, "layer_idx"))
    return next((module for module in modules if module is not layer and hasattr(module, "scaling")), None)


def register(function: Callable[..., Any]) -> None:
    """Put `function` into the table of attention functions.

    Raises:
        UnsupportedModelError: there is no such table.
    """
    interface = need("transformers", "AttentionInterface", role="table of attention functions")
    look_up(interface, "register", role="way to register")(NAME, function)
    _finder()


def _finder() -> Any:
    """What finds an attention function by its name."""
    table = need("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", role="table of attention functions")
    return look_up(table, "get_interface", role="look-up")


def proxy_of(module: nn.Module) -> tuple[str, Any]:
    """Attribute of a probed attention module, and what takes its place."""
    return _FIELD, ProxyConfig(getattr(module, _FIELD))


def layer_index(module: nn.Module) -> int:
    """Which layer an attention module belongs to."""
    return int(module.layer_idx)  # type: ignore[arg-type]


def implementation_of(module: nn.Module) -> str:
    """The implementation that a probed attention module would run."""
    config: Any = module.config
    return str(config.original._attn_implementation)


def real_function(module: nn.Module) -> Any:
    """The attention function that a probed module would call."""
    beside = sys.modules[type(module).__module__]
    found = _finder()(implementation_of(module), getattr(beside, _EAGER, None))
    if found is None:
        raise missing("eager attention", of=beside.__name__, wanted=[_EAGER], seen=vars(beside))
    return found


def softcap_of(module: nn.Module, options: dict[str, Any]) -> float | None:
    """The cap that the attention function of a probed module puts on its logits when it is called with `options`; None
    for none.

    A function that caps names its parameter `softcap`. One that does not may be handed a cap all the same: the sdpa
    function of transformers 5.17 does as if there were none, and later ones raise.
    """
    softcap = options.get("softcap")
    return softcap if softcap is not None and "softcap" in names_of(real_function(module)) else None


def scale_of(query: Tensor, options: dict[str, Any]) -> float:
    """The factor of the logits of an attention function that is called with `options`."""
    scale = options.get("scaling")
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


def is_plain(options: dict[str, Any]) -> bool:
    """Whether an attention function called with `options` computes a softmax over masked logits and nothing else."""
    return not any(options.get(name) is not None for name in _BESIDE_MASK) and not options.get("dropout")


def has_sinks(module: nn.Module) -> bool:
    """Whether an attention adds sinks to its logits."""
    return getattr(module, "sinks", None) is not None


def checkpoints(module: nn.Module) -> bool:
    """Whether gradient checkpointing is on in a module."""
    return bool(getattr(module, "gradient_checkpointing", False))


def head_width(module: nn.Module) -> int:
    """Width K of the heads of an attention whose projections can be sliced."""
    return int(getattr(module, "head_dim", 0))


def whole_projections(module: nn.Module) -> str | None:
    """Why the projections of an attention cannot be sliced by head, None where they can."""
    linears: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
    for name, linear in zip(PROJECTIONS, linears, strict=True):
        if linear is None:
            return f"{type(module).__name__} has no {name} of its own"
        if (why := not_plain(linear)) is not None:
            return f"{name} {why}"
    width = head_width(module)
    forward: Any = inspect.unwrap(type(module).forward)
    named = set(getattr(getattr(forward, "__code__", None), "co_names", ()))
    split = width > 0 and linears[0].out_features == linears[1].in_features
    if not split or not set(PROJECTIONS) <= named or named & _COUNTED or _by_head(module, width):
        return f"{type(module).__name__} counts on all heads"
    return None


def not_plain(linear: Any) -> str | None:
    """What keeps a layer from being sliced, None for a plain linear layer."""
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}"
    if type(linear.weight) is not nn.Parameter:
        return f"has a {type(linear.weight).__name__} as its weight"
    if "forward" in linear.__dict__ or "_hf_hook" in linear.__dict__:
        return "has a forward of its own"
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return "has hooks" if any(hooks) else None


def _by_head(module: nn.Module, width: int) -> bool:
    """Whether the attention has anything beside its projections that knows of single heads."""
    projections = {id(getattr(module, name, None)) for name in (*PROJECTIONS, *_OTHER_PROJECTIONS)}
    others = [child for child in module.children() if id(child) not in projections]
    sizes = [parameter.numel() for child in others for parameter in child.parameters()]
    return any(True for _ in module.parameters(recurse=False)) or any(size > width for size in sizes)


def tensor_parallel(model: nn.Module) -> bool:
    """Whether the weights of a model are split over several processes, each of which computes heads of its own.

    Weights that ``fully_shard`` has split are put together again before they are used.
    """
    if (getattr(model, "tp_size", None) or 1) > 1:
        return True
    sharded = {
        id(parameter)
        for module in model.modules()
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
        for parameter in module.parameters()
    }
    split: list[Any] = [one for one in model.parameters() if type(one).__name__ == "DTensor"]
    return any(
        id(one) not in sharded or sum(type(place).__name__.endswith("Shard") for place in one.placements) > 1
        for one in split
    )
