"""How a block of a vision encoder can be reduced: found out by running it on a few random tokens."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenprune.encoder.block_split import agree, attempt, first_of, has_halves, reading
from tokenprune.errors import UnsupportedModelError
from tokenprune.upstream.tower import Keys, Logits, Tower

_FUSED = nn.functional.scaled_dot_product_attention
_SOFTMAX = (torch.softmax, nn.functional.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Block:
    """A block, and how its tokens can be reduced.

    Attributes:
        number: its index.
        module: the block.
        middle: the norm before its MLP, in front of which tokens are reduced; None where that is not possible.
        read: where its `"keys"` are read and, where a method asks for attention scores, `"query"` and `"key"` of all
            heads.
        logits: what its attention logits are made of; None where no method asks for them.
        names: what its forward's arguments are called.
    """

    number: int
    module: nn.Module
    middle: nn.Module | None
    read: dict[str, Keys]
    logits: Logits | None
    names: tuple[str, ...]


def block_of(
    tower: Tower, host: nn.Module, number: int, module: nn.Module, *, proportional: bool, scored: bool = False
) -> Block:
    """Find out how a block can be reduced.

    Args:
        tower: the row of the encoder.
        host: the encoder.
        number: index of the block.
        module: the block; nothing is left on it.
        proportional: whether its attention is to count tokens by their sizes.
        scored: whether a method ranks its tokens by the attention that they receive.

    Raises:
        UnsupportedModelError: it cannot.
    """
    what = f"block {number} ({type(module).__name__}) of {type(host).__name__} cannot be reduced"
    names, keys = tuple(inspect.signature(module.forward).parameters), tower.keys(module)
    if keys is None:
        wanted = ["a projection of keys or a norm behind it"]
        raise UnsupportedModelError(f"{what}: {tower.lacking('keys', module, wanted)}")
    tower.check_arguments(host, module, counts=proportional)
    parts, logits = tower.second_half(module), tower.logits(module) if scored else None
    x, kwargs = tower.sample(host, module, number)
    kwargs |= {tower.mask: x.new_zeros(2, 1, 1, x.shape[1])} if proportional else {}
    read = {"keys": keys} if logits is None else {"keys": keys, "query": logits.query, "key": logits.key}
    seen: dict[str, list[Tensor]] = {name: [] for name in read}
    watch = _Watch()
    try:
        with watch if scored else nullcontext():
            output = attempt(module, x, kwargs, *(reading(one, seen[name].append) for name, one in read.items()))
    except Exception as error:  # what others' code raises on parts that are not what they seem is open
        raise UnsupportedModelError(f"{what}: on a few random tokens it raised {error!r}") from error
    if len(seen["keys"]) != 1 or seen["keys"][0].shape[:2] != x.shape[:2]:
        raise UnsupportedModelError(f"{what}: its keys were not found where they were looked for")
    if scored and (reason := _disagreement(logits, seen, watch.seen, kwargs.get(tower.rope))):
        raise UnsupportedModelError(f"{what} by the attention that its tokens gather: {reason}")
    halved = parts is not None and has_halves(module, *parts, x, kwargs, first_of(output))
    return Block(number, module, parts[0] if parts is not None and halved else None, read, logits, names)


class _Watch(TorchFunctionMode):
    """Notes the logits `[B, H, N, N]` of every attention computed meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
        if func is _FUSED:
            self.seen.append(_product(given["query"], given["key"], given.get("scale")))
        elif func in _SOFTMAX:
            self.seen.append(args[0].float())
        return func(*args, **(kwargs or {}))


def _product(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return query.float() @ key.float().transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)


def _disagreement(logits: Logits | None, seen: dict[str, list[Tensor]], watched: list[Tensor], rope: Any) -> str:
    """Why `logits` are not those of a block's attention, "" where they are.

    Args:
        logits: what its logits are said to be made of.
        seen: the queries and keys that were read.
        watched: the logits of the attentions that were computed meanwhile.
        rope: the rotary embeddings that the block got.
    """
    if logits is None:
        return "it has no queries and keys that could be read"
    if len(watched) != 1 or not seen["query"] or not seen["key"]:
        return (
            "one attention was looked for in it, with its queries and keys, and "
            f"{len(watched)} were seen; attn_implementation='sdpa' works for encoders of transformers"
        )
    query, key = seen["query"][0], seen["key"][0]
    ours = _product(logits.turned(query, rope), logits.turned(key, rope), logits.scale)
    if not agree(ours.to(query.dtype), watched[0].to(query.dtype)):
        return "the logits of its attention are not made of the queries and keys that were found in it"
    return ""
