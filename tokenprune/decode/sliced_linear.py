"""Query and output projections that compute kept heads only.

While a model is patched, a :class:`SlicedLinear` takes the place of the query projection of an attention, and another
one that of its output projection. The query projection decides: with fewer heads coming out of it, the attention runs
on fewer heads, and the output projection sees by the width of its input which columns are wanted.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.decode.heads import heads_of
from tokenprune.decoder.state import Forward
from tokenprune.hooks import Swap
from tokenprune.running import current
from tokenprune.session import Session
from tokenprune.upstream.attention import PROJECTIONS, head_width, not_plain, whole_projections

FEW_TOKENS = 16  # in a row; below, cutting the weights costs about what it saves


class Pair:
    """The two projections of one layer.

    Args:
        session: that of the patched model.
        module: the layer's attention.
        layer: index of the layer.
    """

    def __init__(self, session: Session, module: nn.Module, layer: int) -> None:
        self.session, self.module, self.layer = session, module, layer
        self.width = head_width(module)
        self.linears = tuple(SlicedLinear(getattr(module, name), self) for name in PROJECTIONS)

    def pattern(self, x: Tensor) -> tuple[int, ...] | None:
        """The heads that are to be computed for the hidden states `x` `[B, L, D]`, None for all.

        Those that the layer keeps, if they are the same in all rows. A call of few tokens cuts no weights for a pattern
        that the call before it on the same cache did not have.
        """
        state = current(Forward, self.session)
        if state is None or state.call is None or state.attention is None or not state.steering:
            return None
        heads = heads_of(state, state.attention, layer=self.layer)
        if heads is None or heads.common is None:
            return None
        if state.patterns.get(self.layer) != heads.common:
            state.patterns[self.layer] = heads.common
            if x.shape[-2] < FEW_TOKENS:
                return None
        return state.patterns[self.layer] if self._in_place() else None

    def _in_place(self) -> bool:
        """Whether both stand where they were put, without hooks of anybody, which are to see everything."""
        there = all(getattr(self.module, name) is one for name, one in zip(PROJECTIONS, self.linears, strict=True))
        return there and not any(not_plain(one.original) for one in self.linears)


class SlicedLinear(nn.Linear):
    """A linear layer of which only some heads are computed. Copies and pickles are the layer itself.

    It shares the whole state of the layer it replaces: parameters, hooks, flags. What it holds beyond that is one
    slice of the weights, the last one.

    Args:
        original: the layer.
        pair: the projections that it is one of.
    """

    __slots__ = ("_guarded", "_slice", "original", "pair")
    original: nn.Linear
    pair: Pair
    _slice: Any
    _guarded: Any

    def __init__(self, original: nn.Linear, pair: Pair) -> None:
        for name, value in (("__dict__", original.__dict__), ("original", original), ("pair", pair), ("_slice", None)):
            object.__setattr__(self, name, value)
        disable: Any = torch.compiler.disable  # here, for it imports torch's compiler
        object.__setattr__(self, "_guarded", disable(self._multiply))

    def forward(self, x: Tensor) -> Tensor:
        """`[.., D]` to the width of the kept heads, or from it back."""
        product: Tensor = self._guarded(x)
        return product

    def _multiply(self, x: Tensor) -> Tensor:
        pair: Pair = self.pair
        inward = self is pair.linears[1]
        pattern = None if inward else pair.pattern(x)
        if inward and x.shape[-1] != self.in_features:
            state = current(Forward, pair.session)
            pattern = None if state is None else state.patterns.get(pair.layer)
        if pattern is None:
            return functional.linear(x, self.weight, self.bias)
        return functional.linear(x, *self._sliced(pattern, inward=inward, anew=x.shape[-2] >= FEW_TOKENS))

    def _sliced(self, pattern: tuple[int, ...], *, inward: bool, anew: bool) -> tuple[Tensor, Tensor | None]:
        """Weights and bias of the heads of `pattern`; cut `anew`, or taken from the call before where it had the same.

        Cutting anew makes sure that no weights are used which were changed behind torch's back since. So does taking
        them for the same only where the cache has noted this very `pattern`, not an equal one of another generation.
        """
        weight, bias = self.weight, self.bias
        if torch.is_grad_enabled():
            return _cut(weight, bias, pattern, width=self.pair.width, inward=inward)
        version = None if weight.is_inference() else weight._version
        key = (pattern, id(weight), weight.data_ptr(), weight.dtype, version)
        found: Any = self._slice
        if anew or found is None or found[0][0] is not pattern or found[0] != key:
            found = key, _cut(weight, bias, pattern, width=self.pair.width, inward=inward)
            object.__setattr__(self, "_slice", found)
        sliced: tuple[Tensor, Tensor | None] = found[1]
        return sliced

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self.original,)

    def _replicate_for_data_parallel(self) -> Any:
        original: Any = self.original
        return original._replicate_for_data_parallel()  # it projects all heads; pruned ones are zeroed, not skipped


def _cut(
    weight: Tensor, bias: Tensor | None, pattern: tuple[int, ...], *, width: int, inward: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the heads of `pattern`, each `width` rows (`inward`: columns) of `weight`."""
    heads = torch.tensor(pattern, dtype=torch.int64, device=weight.device)
    if inward:
        return weight.view(len(weight), -1, width).index_select(1, heads).flatten(1), bias
    rows = weight.view(-1, width, weight.shape[1]).index_select(0, heads).flatten(0, 1)
    return rows, None if bias is None else bias.view(-1, width).index_select(0, heads).flatten()


def _itself(original: Any) -> Any:
    return original


def swaps(session: Session, module: nn.Module, layer: int) -> list[Swap] | str:
    """What makes the attention `module` of a layer project kept heads only, or why its projections are left whole."""
    if (reason := whole_projections(module)) is not None:
        return reason
    pair = Pair(session, module, layer)
    return [Swap(module, name, one) for name, one in zip(PROJECTIONS, pair.linears, strict=True)]
