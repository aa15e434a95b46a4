"""Calls of text decoders and of their layers, read into neutral words and written back.

A hook sees keyword arguments under upstream's names. :class:`DecoderCall` and :class:`LayerCall` hold the same values
by their roles; ``arguments`` gives them back under the names they came by or, where they were not given, by those of the
forward's signature. A role may have several names (the KV cache was renamed in transformers 5.24): a caller may use
any of them, since hooks run before transformers' own renaming does.

What has no role is handed on. Where tokens are taken out it must be clear what such an argument holds: tensors with a
row for every token are shortened, flags and numbers stay, and anything else that holds tensors raises: it would fall
out of step without a word.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenprune.errors import InputError, UnsupportedModelError
from tokenprune.reduction import Keep, gather
from tokenprune.upstream.check import missing, version_of

DECODER_ROLES: Mapping[str, tuple[str, ...]] = {
    "embeds": ("inputs_embeds",),
    "ids": ("input_ids",),
    "mask": ("attention_mask",),
    "positions": ("position_ids",),
    "cache": ("cache", "past_key_values"),
    "caches": ("use_cache",),
    "plane_tokens": ("visual_pos_masks",),
    "planes": ("deepstack_visual_embeds",),
}
LAYER_ROLES: Mapping[str, tuple[str, ...]] = {
    "mask": ("attention_mask",),
    "positions": ("position_ids",),
    "rope": ("position_embeddings",),
    "cache": ("cache", "past_key_values"),
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


def _written(role: str, roles: Mapping[str, tuple[str, ...]], module: nn.Module) -> str:
    """The name that the forward of `module` has for a role."""
    names = parameters_of(module)
    return next((name for name in roles[role] if name in names), roles[role][0])


def _roles_in(roles: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {name: role for role, names in roles.items() for name in names}


_DECODER_WORDS, _LAYER_WORDS = _roles_in(DECODER_ROLES), _roles_in(LAYER_ROLES)


def _sorted_out(
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


def check_layer(layer: nn.Module) -> None:
    """Check that the forward of a decoder layer takes all that pruning between layers works with.

    Raises:
        UnsupportedModelError: a role is missing.
    """
    _check(layer, _LAYER_NEEDS, LAYER_ROLES)


_SAID = {
    "embeds": "argument for embeddings",
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


def _refuse_unknown(name: str, module: nn.Module, value: Any) -> None:
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


@dataclass
class DecoderCall:
    """What a text decoder is called with.

    Attributes:
        module: the decoder.
        embeds: `[B, L, D]`, or None where it is called with ids.
        ids: `[B, L]`, or None.
        mask: the attention mask in any of its forms.
        positions: `[B, L]` or `[3 or 4, B, L]`, or None.
        cache: the KV cache, or None.
        caches: whether one is wanted; None: as the config says.
        plane_tokens: `[B, L]` bool, which tokens DeepStack's features belong to, or None.
        planes: DeepStack's features for the first layers, `[n, D]` each, or None.
        others: what else was given, by upstream's names.
    """

    module: nn.Module
    embeds: Tensor | None = None
    ids: Tensor | None = None
    mask: Any = None
    positions: Tensor | None = None
    cache: Any = None
    caches: bool | None = None
    plane_tokens: Tensor | None = None
    planes: list[Tensor] | None = None
    others: dict[str, Any] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        """What `module` is being called with."""
        values, names, others = _sorted_out(bind(module.forward, args, kwargs), _DECODER_WORDS)
        return cls(module, **values, others=others, _names=names)

    def arguments(self) -> dict[str, Any]:
        """The same as keyword arguments."""
        given = dict(self.others)
        for role in DECODER_ROLES:
            value = getattr(self, role)
            if role in self._names or value is not None:
                given[self._names.get(role) or _written(role, DECODER_ROLES, self.module)] = value
        return given

    def shorten(self, keep: Keep) -> None:
        """Shorten every per-token argument; the mask is not among them.

        Raises:
            InputError: several sequences are packed into a row.
            UnsupportedModelError: an argument holds tensors, and it is not known for which tokens.
        """
        assert self.embeds is not None
        per_token = self.embeds.shape[:2]
        for name, value in self.others.items():
            if isinstance(value, Tensor) and value.shape[:2] == per_token:
                self.others[name] = keep.apply(value)
            else:
                _refuse_unknown(name, self.module, value)
        if self.plane_tokens is not None and self.planes is not None:
            self._shorten_planes(keep)
        elif self.planes is not None:
            _refuse_unknown(self._names["planes"], self.module, self.planes)
        if self.positions is not None:
            self.positions = keep.apply(self.positions, dim=self.positions.ndim - 1)
        self.embeds = keep.apply(self.embeds)
        if self.ids is not None:
            self.ids = keep.apply(self.ids)

    def _shorten_planes(self, keep: Keep) -> None:
        """A plane has one row for each visual token of the batch."""
        visual = self.plane_tokens
        assert visual is not None
        assert self.planes is not None
        number = (visual.flatten().cumsum(0) - 1).view_as(visual)
        left = keep.apply(visual)
        left = left if keep.valid is None else left & keep.valid.to(left.device)
        rows = keep.apply(number)[left]
        self.planes = [plane[rows.to(plane.device)] for plane in self.planes]
        self.plane_tokens = left

    def change_planes(self, change: Callable[[Tensor], None]) -> None:
        """Let `change` write into each plane, laid out as `[B, L, D]`."""
        visual = self.plane_tokens
        if visual is None or self.planes is None:
            return
        changed = []
        for plane in self.planes:
            whole = plane.new_zeros(*visual.shape, plane.shape[-1])
            whole[visual.to(plane.device)] = plane
            change(whole)
            changed.append(whole[visual.to(plane.device)])
        self.planes = changed


def call_decoder(decoder: nn.Module, *, embeds: Tensor, mask: Any, positions: Tensor, cache: Any = None) -> Tensor:
    """Hidden states `[B, L, D]` that a decoder gives, with a KV cache or without."""
    call = DecoderCall(decoder, embeds, mask=mask, positions=positions, cache=cache, caches=cache is not None)
    output = decoder(**call.arguments())
    return states_of(output, type(decoder).__name__)


def states_of(output: Any, called: str) -> Tensor:
    """The last hidden states among what a decoder returned.

    Raises:
        UnsupportedModelError: there are none.
    """
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
    found = next((value for value in values if isinstance(value, Tensor) and value.ndim == 3), None)
    if found is None:
        seen = output.keys() if isinstance(output, Mapping) else [type(output).__name__]
        raise missing("hidden states", of=f"what {called} returns", wanted=["a tensor [B, L, D]"], seen=seen)
    return found


def lengthen_output(output: Any, last: Callable[[Tensor], Tensor], by_layer: Callable[[tuple[Any, ...]], Any]) -> Any:
    """What a decoder returned with the unpruned length.

    Args:
        output: a tuple, or a ``ModelOutput``, which is changed.
        last: what to do with hidden states behind the last layer.
        by_layer: what to do with a tuple of tensors, one for each layer.
    """

    def change(value: Any) -> Any:
        if isinstance(value, Tensor):
            return last(value)
        return by_layer(value) if isinstance(value, tuple) and value and isinstance(value[0], Tensor) else value

    if isinstance(output, tuple):
        return tuple(map(change, output))
    for name, value in list(output.items()):
        if isinstance(value, Tensor | tuple):
            output[name] = change(value)
    return output


@dataclass
class LayerCall:
    """What a decoder layer is called with.

    Attributes:
        module: the layer.
        hidden: hidden states `[B, M, D]`.
        mask: the attention mask in the form that its attention takes.
        positions: `[B, M]` or `[3 or 4, B, M]`, or None.
        rope: rotary embeddings: a tensor or a tuple of tensors `[.., M, K]`, or None.
        cache: the KV cache, or None.
        others: what else was given, by upstream's names.
    """

    module: nn.Module
    hidden: Tensor
    mask: Any = None
    positions: Any = None
    rope: Any = None
    cache: Any = None
    others: dict[str, Any] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)
    _first: str | None = None

    @classmethod
    def read(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        """What `module` is being called with."""
        first = None
        if not args:  # hidden states come first, whatever they are called
            first = next(name for name in parameters_of(module) if name in kwargs)
            args, kwargs = (kwargs[first],), {name: value for name, value in kwargs.items() if name != first}
        if len(args) > 1:
            kwargs = {**dict(zip(parameters_of(module)[1:], args[1:], strict=False)), **kwargs}
        values, names, others = _sorted_out(kwargs, _LAYER_WORDS)
        return cls(module, args[0], **values, others=others, _names=names, _first=first)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same as positional and keyword arguments."""
        given = dict(self.others)
        for role in LAYER_ROLES:
            value = getattr(self, role)
            if role in self._names or value is not None:
                given[self._names.get(role) or _written(role, LAYER_ROLES, self.module)] = value
        if self._first is not None:
            return (), {self._first: self.hidden, **given}
        return (self.hidden,), given

    def shorten(self, local: Tensor, *, n_tokens: int) -> None:
        """Shorten what the decoder made for `n_tokens` tokens of each row, but for hidden states and mask.

        Args:
            local: `[B, M]` int64, the tokens that go on.
            n_tokens: tokens of each row that the decoder was given.

        Raises:
            InputError: several sequences are packed into a row.
            UnsupportedModelError: an argument holds tensors, and it is not known for which tokens.
        """
        per_token = (local.shape[0], n_tokens)
        if isinstance(self.rope, Tensor):
            self.rope = gather(self.rope, local, dim=self.rope.ndim - 2)
        elif isinstance(self.rope, tuple | list):
            self.rope = tuple(gather(part, local, dim=part.ndim - 2) for part in self.rope)
        elif self.rope is not None:
            _refuse_unknown(self._names["rope"], self.module, self.rope)
        if isinstance(self.positions, Tensor):
            self.positions = gather(self.positions, local, dim=self.positions.ndim - 1)
        for name, value in self.others.items():
            if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == per_token:
                self.others[name] = gather(value, local)
            else:
                _refuse_unknown(name, self.module, value)


def first_of_kwargs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()))


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


def text_decoder(model: object) -> nn.Module | None:
    """The text decoder of a model that has one apart from itself, else None."""
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    return decoder if isinstance(decoder, nn.Module) else None
