"""What a decoder layer is called with, in neutral words."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from tokenprune.reduction import gather
from tokenprune.upstream.calls import ModuleCall, bind, parameters_of, refuse_unknown


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
        return cls._sorted(module, given, hidden=hidden, first=None if args else first)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same as positional and keyword arguments."""
        if self.first is not None:
            return (), {self.first: self.hidden, **self._written()}
        return (self.hidden,), self._written()

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
        self._shorten_others((local.shape[0], n_tokens), partial(gather, index=local))


def first_of_kwargs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()))
