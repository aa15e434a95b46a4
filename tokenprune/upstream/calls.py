"""Calls of text decoders and of their layers: which argument plays which role, under whatever name it comes.

A role may have several names (the KV cache was renamed in transformers 5.24): a caller may use any of them, since hooks
run before transformers' own renaming does. What has no role is handed on. Where tokens are taken out it must be clear
what such an argument holds: tensors with a row for every token are shortened, flags and numbers stay, and anything else
that holds tensors raises: it would fall out of step without a word.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.upstream.check import look_up, missing, version_of

CACHE = ("cache", "past_key_values")
"""Names of the KV cache among arguments and in outputs, newest first: transformers 5.24 renamed it."""
LOGITS = "logits_to_keep"
"""Name of the argument that says of how many of the last tokens logits are wanted."""
ROLES: Mapping[str, tuple[str, ...]] = {
    "config": ("config",),
    "embeds": ("inputs_embeds",),
    "ids": ("input_ids",),
    "mask": ("attention_mask",),
    "positions": ("position_ids",),
    "rope": ("position_embeddings",),
    "cache": CACHE,
    "caches": ("use_cache",),
    "plane_tokens": ("visual_pos_masks",),
    "planes": ("deepstack_visual_embeds",),
}
"""Names of the arguments of decoders, of their layers and of the function that builds masks, by role."""
_SAID = {
    "config": "argument for the configuration",
    "embeds": "argument for embeddings",
    "ids": "argument for token ids",
    "mask": "argument for the attention mask",
    "positions": "argument for positions",
    "cache": "argument for the KV cache",
    "plane_tokens": "argument for the places of DeepStack features",
    "planes": "argument for DeepStack features",
}
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@lru_cache(maxsize=256)
def names_of(function: Any) -> tuple[str, ...]:
    """Names of the parameters of a function, which is remembered: no bound method."""
    return tuple(inspect.signature(function).parameters)


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward."""
    if "forward" in module.__dict__:  # wrapped by somebody, such as accelerate
        return tuple(inspect.signature(module.forward).parameters)
    return names_of(type(module).forward)[1:]


def bind(names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, where `names` are those of the parameters."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_roles(seen: Iterable[str], wanted: Iterable[str], *, of: str) -> dict[str, str]:
    """The parameter that has each of the `wanted` roles among the parameters `seen` of a function.

    Args:
        seen: names of the parameters.
        wanted: some of the keys of :data:`ROLES`.
        of: what the function is called in messages.

    Raises:
        UnsupportedModelError: a role is missing.
    """
    found = {role: next((name for name in ROLES[role] if name in seen), "") for role in wanted}
    for role, name in found.items():
        if not name:
            raise missing(_SAID[role], of=of, wanted=ROLES[role], seen=seen)
    return found


def check_forward(module: nn.Module, *wanted: str) -> None:
    """Check that the forward of a module has arguments for the `wanted` roles, which are some of :data:`ROLES`.

    Raises:
        UnsupportedModelError: a role is missing.
    """
    check_roles(parameters_of(module), wanted, of=f"the forward of {type(module).__name__}")


@lru_cache
def _roles_by_name(roles: tuple[str, ...]) -> dict[str, str]:
    return {name: role for role in roles for name in ROLES[role]}


@dataclass
class ModuleCall:
    """What a module is called with, by role.

    Attributes:
        roles: the keys of :data:`ROLES` that are attributes of this class.
        module: what is called.
        others: what else was given, by upstream's names.
        names: the names that the roles came by.
    """

    roles: ClassVar[tuple[str, ...]] = ()
    module: nn.Module
    others: dict[str, Any] = field(default_factory=dict, kw_only=True)
    names: dict[str, str] = field(default_factory=dict, kw_only=True)

    @classmethod
    def from_roles(cls, module: nn.Module, given: Mapping[str, Any], **known: Any) -> Self:
        """A call with the arguments `given` by name and with values `known` already."""
        roles = _roles_by_name(cls.roles)
        values: dict[str, Any] = {}
        names: dict[str, str] = {}
        others: dict[str, Any] = {}
        for name, value in given.items():
            if name not in roles:
                others[name] = value
            elif values.get(roles[name]) is None:
                values[roles[name]], names[roles[name]] = value, name
        return cls(module, **known, **values, others=others, names=names)

    def as_given(self) -> dict[str, Any]:
        """The same as keyword arguments, under the names that they came by or, where they were not given, by those that
        the forward has for them."""
        given, parameters = dict(self.others), parameters_of(self.module)
        for role in self.roles:
            value = getattr(self, role)
            if role in self.names or value is not None:
                name = self.names.get(role) or next((one for one in ROLES[role] if one in parameters), ROLES[role][0])
                given[name] = value
        return given

    def shorten_others(self, per_token: tuple[int, ...], shorten: Callable[[Tensor], Tensor]) -> None:
        """Shorten what has no role and a row for each of the tokens `per_token` `(B, L)`.

        Raises:
            InputError: several sequences are packed into a row.
            UnsupportedModelError: an argument holds tensors, and it is not known for which tokens.
        """
        for name, value in self.others.items():
            if isinstance(value, Tensor) and value.shape[:2] == per_token:
                self.others[name] = shorten(value)
            else:
                refuse_unknown(name, value, of=type(self.module).__name__)


def refuse_unknown(name: str, value: Any, *, of: str, known: str = "", library: str = "transformers") -> None:
    """Raise where an argument `value`, which has no role and no row for every token, holds tensors.

    Args:
        name: what it is called.
        value: what it holds.
        of: what was called with it.
        known: the arguments whose tokens are known, in words.
        library: the package that was called.

    Raises:
        InputError: several sequences are packed into a row.
        UnsupportedModelError: it holds tensors, and it is not known for which tokens.
    """
    if name in _PACKING and value is not None:
        raise InputError(
            f"{name} says that several sequences are packed into one row, which pruning does not respect; give each "
            "sequence a row of its own, padded"
        )
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    if tensors:
        raise UnsupportedModelError(
            f"{of} was called with {name!r} (a {type(value).__name__} with a tensor of shape "
            f"{list(tensors[0].shape)}), and it is not known for which tokens{known}; nothing was pruned ({library} "
            f"{version_of(library)})"
        )


def parts_of(output: Any) -> dict[str, Any]:
    """What a model returned: its parts by name or, in a tuple, by place."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple):
        return {str(place): part for place, part in enumerate(output)}
    return {type(output).__name__: output}


def embedding_of(root: nn.Module, token_id: int, *, like: Tensor) -> Tensor:
    """The embedding `[D]` of a token, as `root` embeds its text.

    Raises:
        UnsupportedModelError: it has no embeddings that are found.
    """
    embed = look_up(root, "get_input_embeddings", role="text embeddings")()
    wanted: Tensor = embed(torch.tensor(token_id, device=like.device, dtype=torch.int64))
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
        if set(ROLES["ids"]) & set(parameters_of(module))
        and not (beside.startswith("transformers.models.") and module.forward.__module__ == beside)
    ]


def _around(root: nn.Module, model: nn.Module) -> list[nn.Module]:
    return [one for one in model.modules() if one is not root and any(inner is root for inner in one.modules())]


def tells_logits(module: nn.Module) -> bool:
    """Whether a module is told how many logits are wanted."""
    return LOGITS in parameters_of(module)


def text_decoder(model: object) -> nn.Module | None:
    """The text decoder of a model that has one apart from itself, else None."""
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    return decoder if isinstance(decoder, nn.Module) else None
