"""Whether what is read of a block are the logits of its attention: found out by watching the attention once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenprune.encoder.block_split import evaluating, hooked, reading
from tokenprune.upstream.tower import Logits

_FUSED = nn.functional.scaled_dot_product_attention
_SOFTMAX = (torch.softmax, nn.functional.softmax, Tensor.softmax)


class _Watch(TorchFunctionMode):
    """Notes the logits `[B, H, N, N]` of every attention computed meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _FUSED:
            given = dict(zip(("query", "key"), args, strict=False)) | kwargs
            self.seen.append(_product(given["query"], given["key"], given.get("scale")))
        elif func in _SOFTMAX:
            self.seen.append(args[0].float())
        return func(*args, **kwargs)


def _product(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return query.float() @ key.float().transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)


def disagreement(logits: Logits | None, block: nn.Module, x: Tensor, kwargs: dict[str, Any], rope: Any) -> str:
    """Why `logits` are not those of a block's attention, "" where they are.

    Args:
        logits: what its logits are said to be made of.
        block: the block; nothing is left on it.
        x: hidden states to try it on, `[B, N, D]`.
        kwargs: what else its forward takes, without a mask.
        rope: rotary embeddings among `kwargs`.
    """
    if logits is None:
        return "it has no queries and keys that could be read"
    found: dict[str, Tensor] = {}
    hooks = [
        reading(logits.query, lambda: True, partial(found.__setitem__, "query")),
        reading(logits.key, lambda: True, partial(found.__setitem__, "key")),
    ]
    with evaluating(block), hooked(hooks), _Watch() as watch:
        block.forward(x, **kwargs)
    if len(found) != 2 or len(watch.seen) != 1:
        return (
            "one attention was looked for in it, with its queries and keys, and "
            f"{len(watch.seen)} were seen; attn_implementation='sdpa' works for encoders of transformers"
        )
    ours = _product(logits.turned(found["query"], rope), logits.turned(found["key"], rope), logits.scale)
    theirs = watch.seen[0]
    close = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
    if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > close * max(1e-6, float(theirs.abs().max())):
        return "the logits of its attention are not made of the queries and keys that were found in it"
    return ""
