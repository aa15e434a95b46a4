"""What a text decoder and its layers are called with, and what they return, in neutral words."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from tokenprune.reduction import Keep, gather
from tokenprune.upstream.calls import ROLES, ModuleCall, bind, parameters_of, parts_of, refuse_unknown
from tokenprune.upstream.check import missing

_RECORDS = "output_hidden_states"


@dataclass
class DecoderCall(ModuleCall):
    """What a text decoder is called with.

    Attributes:
        embeds: `[B, L, D]`, or None where it is called with ids.
        ids: `[B, L]`, or None.
        mask: the attention mask in any of its forms.
        positions: `[B, L]` or `[3 or 4, B, L]`, or None.
        cache: the KV cache, or None.
        caches: whether one is wanted; None: as the config says.
        plane_tokens: `[B, L]` bool, which tokens DeepStack's features belong to, or None.
        planes: DeepStack's features for the first layers, `[n, D]` each, or None.
    """

    roles = ("embeds", "ids", "mask", "positions", "cache", "caches", "plane_tokens", "planes")
    embeds: Tensor | None = None
    ids: Tensor | None = None
    mask: Any = None
    positions: Tensor | None = None
    cache: Any = None
    caches: bool | None = None
    plane_tokens: Tensor | None = None
    planes: list[Tensor] | None = None

    @classmethod
    def read(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        """What `module` is being called with."""
        return cls.from_roles(module, bind(parameters_of(module), args, kwargs))

    def arguments(self) -> dict[str, Any]:
        """The same as keyword arguments."""
        return self.as_given()

    @property
    def records(self) -> bool:
        """Whether the hidden states of layers are wanted."""
        config: Any = getattr(self.module, "config", None)
        asked = self.others.get(_RECORDS)
        return bool(getattr(config, _RECORDS, False) if asked is None else asked)

    def shorten(self, keep: Keep) -> None:
        """Shorten every per-token argument; the mask is not among them.

        Raises:
            InputError: several sequences are packed into a row.
            UnsupportedModelError: an argument holds tensors, and it is not known for which tokens.
        """
        assert self.embeds is not None
        self.shorten_others(self.embeds.shape[:2], keep.apply)
        if self.plane_tokens is not None and self.planes is not None:
            self._shorten_planes(keep)
        elif self.planes is not None:
            refuse_unknown(self.names["planes"], self.planes, of=type(self.module).__name__)
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
        kept = keep.apply(visual)
        kept = kept if keep.valid is None else kept & keep.valid.to(kept.device)
        rows = keep.apply(number)[kept]
        self.planes = [plane[rows.to(plane.device)] for plane in self.planes]
        self.plane_tokens = kept

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


@dataclass
class LayerCall(ModuleCall):
    """What a decoder layer is called with.

    Attributes:
        hidden: hidden states `[B, M, D]`.
        first: the name that they came by, None where they came first without one.
        mask: the attention mask in the form that its attention takes.
        positions: `[B, M]` or `[3 or 4, B, M]`, or None.
        rope: rotary embeddings: a tensor or a tuple of tensors `[.., M, K]`, or None.
        cache: the KV cache, or None.
    """

    roles = ("mask", "positions", "rope", "cache")
    hidden: Tensor
    first: str | None
    mask: Any = None
    positions: Any = None
    rope: Any = None
    cache: Any = None

    @classmethod
    def read(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        """What `module` is being called with."""
        parameters = parameters_of(module)
        given = bind(parameters, args, kwargs)
        first = next(name for name in parameters if name in given)  # hidden states, whatever they are called
        hidden = given.pop(first)
        return cls.from_roles(module, given, hidden=hidden, first=None if args else first)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same as positional and keyword arguments."""
        if self.first is not None:
            return (), {self.first: self.hidden, **self.as_given()}
        return (self.hidden,), self.as_given()

    def shorten(self, local: Tensor, *, n_tokens: int) -> None:
        """Shorten what the decoder made for `n_tokens` tokens of each row, but for hidden states and mask.

        Args:
            local: `[B, M]` int64, the tokens that are kept.
            n_tokens: tokens of each row that the decoder was given.

        Raises:
            InputError: several sequences are packed into a row.
            UnsupportedModelError: an argument holds tensors, and it is not known for which tokens.
        """
        if isinstance(self.rope, Tensor):
            self.rope = gather(self.rope, local, dim=self.rope.ndim - 2)
        elif isinstance(self.rope, tuple | list):
            self.rope = tuple(gather(part, local, dim=part.ndim - 2) for part in self.rope)
        elif self.rope is not None:
            refuse_unknown(self.names["rope"], self.rope, of=type(self.module).__name__)
        if isinstance(self.positions, Tensor):
            self.positions = gather(self.positions, local, dim=self.positions.ndim - 1)
        self.shorten_others((local.shape[0], n_tokens), partial(gather, index=local))


def call_decoder(decoder: nn.Module, *, embeds: Tensor, mask: Any, positions: Tensor, cache: Any = None) -> Tensor:
    """Hidden states `[B, L, D]` that a decoder gives, with a KV cache or without.

    Raises:
        UnsupportedModelError: there are none among what it returns.
    """
    call = DecoderCall(decoder, embeds, mask=mask, positions=positions, cache=cache, caches=cache is not None)
    parts = parts_of(decoder(**call.arguments()))
    found = next((part for part in parts.values() if isinstance(part, Tensor) and part.ndim == 3), None)
    if found is None:
        of = f"what {type(decoder).__name__} returns"
        raise missing("hidden states", of=of, wanted=["a tensor [B, L, D]"], seen=parts)
    return found


def lengthen_output(output: Any, last: Callable[[Tensor], Tensor], by_layer: Callable[[tuple[Any, ...]], Any]) -> Any:
    """What a decoder returned with the unpruned length.

    Args:
        output: a tuple, or a ``ModelOutput``, which is changed.
        last: what to do with hidden states behind the last layer.
        by_layer: what to do with a tuple of tensors, one for each layer, or None in place of some.
    """

    def change(value: Any) -> Any:
        if isinstance(value, Tensor):
            return last(value)
        several = isinstance(value, tuple) and any(isinstance(one, Tensor) for one in value)  # None: not asked for
        return by_layer(value) if several else value

    if isinstance(output, tuple):
        return tuple(map(change, output))
    for name, value in list(output.items()):
        output[name] = change(value)
    return output


def first_of_kwargs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()))


def with_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Any) -> Any:
    """The arguments of a call of a layer with another attention mask; None where it has that one already."""
    name = next((name for name in ROLES["mask"] if name in kwargs), None)
    if name is None or len(args) > 1:
        given = LayerCall.read(module, args, kwargs)
        given.mask = mask
        return given.arguments()
    return None if kwargs[name] is mask else (args, {**kwargs, name: mask})
