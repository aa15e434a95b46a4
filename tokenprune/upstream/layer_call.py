"""What a decoder layer is called with, in neutral words."""

from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from tokenprune.reduction import gather
from tokenprune.upstream.calls import LAYER_ROLES, LAYER_WORDS, parameters_of, refuse_unknown, sorted_out, written


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
        values, names, others = sorted_out(kwargs, LAYER_WORDS)
        return cls(module, args[0], **values, others=others, _names=names, _first=first)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same as positional and keyword arguments."""
        given = dict(self.others)
        for role in LAYER_ROLES:
            value = getattr(self, role)
            if role in self._names or value is not None:
                given[self._names.get(role) or written(role, LAYER_ROLES, self.module)] = value
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
            refuse_unknown(self._names["rope"], self.module, self.rope)
        if isinstance(self.positions, Tensor):
            self.positions = gather(self.positions, local, dim=self.positions.ndim - 1)
        for name, value in self.others.items():
            if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == per_token:
                self.others[name] = gather(value, local)
            else:
                refuse_unknown(name, self.module, value)


def first_of_kwargs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()))


def is_unmasked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a layer is called by keywords, without an attention mask."""
    return len(args) <= 1 and all(kwargs.get(name) is None for name in LAYER_ROLES["mask"])
