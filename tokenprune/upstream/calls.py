"""Calls of text decoders and of their layers: which argument plays which role, under whatever name it comes.

A role may have several names (the KV cache was renamed in transformers 5.24): a caller may use any of them, since hooks
run before transformers' own renaming does. What has no role is handed on. Where tokens are taken out it must be clear
what such an argument holds: tensors with a row for every token are shortened, flags and numbers stay, and anything else
that holds tensors raises: it would fall out of step without a word.
"""

import inspect
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.upstream.check import missing, version_of

CACHE = ("cache", "past_key_values")
"""Names of the KV cache among arguments and in outputs, newest first: transformers 5.24 renamed it."""
LOGITS = "logits_to_keep"
"""Name of the argument that says of how many of the last tokens logits are wanted."""
DECODER_ROLES: Mapping[str, tuple[str, ...]] = {
    "embeds": ("inputs_embeds",),
    "ids": ("input_ids",),
    "mask": ("attention_mask",),
    "positions": ("position_ids",),
    "cache": CACHE,
    "caches": ("use_cache",),
    "plane_tokens": ("visual_pos_masks",),
    "planes": ("deepstack_visual_embeds",),
}
LAYER_ROLES: Mapping[str, tuple[str, ...]] = {
    "mask": ("attention_mask",),
    "positions": ("position_ids",),
    "rope": ("position_embeddings",),
    "cache": CACHE,
}
_DECODER_NEEDS = ("embeds", "mask", "positions", "cache")
_LAYER_NEEDS = ("mask", "cache")  # and "rope", but for those whose positions are in the embeddings
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def bind(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


@lru_cache(maxsize=256)
def _parameters_of_class(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward."""
    if "forward" in module.__dict__:  # wrapped by somebody, such as accelerate
        return tuple(inspect.signature(module.forward).parameters)
    cls: Any = type(module)
    return _parameters_of_class(cls)


def written(role: str, roles: Mapping[str, tuple[str, ...]], module: nn.Module) -> str:
    """The name that the forward of `module` has for a role."""
    names = parameters_of(module)
    return next((name for name in roles[role] if name in names), roles[role][0])


def _roles_in(roles: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {name: role for role, names in roles.items() for name in names}


DECODER_WORDS, LAYER_WORDS = _roles_in(DECODER_ROLES), _roles_in(LAYER_ROLES)


def sorted_out(
    given: Mapping[str, Any], words: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Values by role, the names that they came by, and what has no role."""
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    others: dict[str, Any] = {}
    for name, value in given.items():
        role = words.get(name)
        if role is None:
            others[name] = value
        elif role not in names or values[role] is None:
            values[role], names[role] = value, name
    return values, names, others


def check_decoder(decoder: nn.Module, *, planes: bool) -> None:
    """Check that the forward of a decoder takes all that pruning works with.

    Args:
        decoder: the text decoder.
        planes: whether it takes feature planes for its first layers (DeepStack).

    Raises:
        UnsupportedModelError: a role is missing.
    """
    wanted = (*_DECODER_NEEDS, *(("plane_tokens", "planes") if planes else ()))
    _check(decoder, wanted, DECODER_ROLES)


def check_root(root: nn.Module) -> None:
    """Check that the forward of the module that calls a decoder takes the text as it is known.

    Raises:
        UnsupportedModelError: a role is missing.
    """
    _check(root, ("ids", "embeds"), DECODER_ROLES)


def check_layer(layer: nn.Module) -> None:
    """Check that the forward of a decoder layer takes all that pruning between layers works with.

    Raises:
        UnsupportedModelError: a role is missing.
    """
    _check(layer, _LAYER_NEEDS, LAYER_ROLES)


_SAID = {
    "embeds": "argument for embeddings",
    "ids": "argument for token ids",
    "mask": "argument for the attention mask",
    "positions": "argument for positions",
    "cache": "argument for the KV cache",
    "plane_tokens": "argument for the places of DeepStack features",
    "planes": "argument for DeepStack features",
    "rope": "argument for rotary embeddings",
}


def _check(module: nn.Module, wanted: Iterable[str], roles: Mapping[str, tuple[str, ...]]) -> None:
    seen = parameters_of(module)
    for role in wanted:
        if not set(roles[role]) & set(seen):
            raise missing(_SAID[role], of=f"the forward of {type(module).__name__}", wanted=roles[role], seen=seen)


def refuse_unknown(name: str, module: nn.Module, value: Any) -> None:
    """Raise where `value`, which has no role and no row for every token, holds tensors."""
    if name in _PACKING and value is not None:
        raise InputError(
            f"{name} says that several sequences are packed into one row, which pruning does not respect; give each "
            "sequence a row of its own, padded"
        )
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    if tensors:
        raise UnsupportedModelError(
            f"{type(module).__name__} was called with {name!r} (a {type(value).__name__} with a tensor of shape "
            f"{list(tensors[0].shape)}), and it is not known for which tokens; nothing was pruned (transformers "
            f"{version_of()})"
        )


def embedding_of(root: nn.Module, token_id: int, *, like: Tensor) -> Tensor:
    """The embedding `[D]` of a token, as `root` embeds its text.

    Raises:
        UnsupportedModelError: it has no embeddings that could be told.
    """
    get: Any = getattr(root, "get_input_embeddings", None)
    if get is None:
        raise missing("text embeddings", of=type(root).__name__, wanted=["get_input_embeddings"])
    wanted: Tensor = get()(torch.tensor(token_id, device=like.device, dtype=torch.int64))
    return wanted.to(like)


def callers_of(root: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that hold `root` and take the number of logits that are wanted, outermost first."""
    return [module for module in _around(root, model) if tells_logits(module)]


def embedders_of(root: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that hold `root` and take ids, and may hand embeddings on in their place, outermost first.

    Classes of transformers do not that stand beside the class of `root`.
    """
    beside = root.forward.__module__
    return [
        module
        for module in _around(root, model)
        if set(DECODER_ROLES["ids"]) & set(parameters_of(module))
        and not (beside.startswith("transformers.models.") and module.forward.__module__ == beside)
    ]


def _around(root: nn.Module, model: nn.Module) -> list[nn.Module]:
    path = next((name for name, module in model.named_modules() if module is root), "").split(".")
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return [module for module in around if module is not root]


def tells_logits(module: nn.Module) -> bool:
    """Whether a module is told how many logits are wanted."""
    return LOGITS in parameters_of(module)


def text_decoder(model: object) -> nn.Module | None:
    """The text decoder of a model that has one apart from itself, else None."""
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    return decoder if isinstance(decoder, nn.Module) else None
