"""How a block of a vision encoder can be reduced: found out by running it on a few random tokens."""

import inspect
from dataclasses import dataclass

from torch import Tensor, nn

from tokenprune.encoder.block_split import evaluating, has_halves, hooked, reading
from tokenprune.encoder.logit_check import disagreement
from tokenprune.errors import UnsupportedModelError
from tokenprune.upstream.tower import Keys, Logits, Tower


@dataclass(frozen=True)
class Block:
    """A block, the norm behind which its second half begins where it has such, where its keys are read, what its logits
    are made of where a method asks for that, and what its forward's arguments are called."""

    module: nn.Module
    middle: nn.Module | None
    keys: Keys
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
        scored: whether a method goes by the attention that its tokens gather.

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
    mask = {tower.mask: x.new_zeros(2, 1, 1, x.shape[1])} if proportional else {}
    seen: list[Tensor] = []
    try:
        with evaluating(module), hooked([reading(keys, lambda: True, seen.append)]):
            module.forward(x, **{**kwargs, **mask})
        reason = disagreement(logits, module, x, kwargs, kwargs.get(tower.rope)) if scored else ""
    except Exception as error:  # what others' code raises on parts that are not what they seem is open
        raise UnsupportedModelError(f"{what}: on a few random tokens it raised {error!r}") from error
    if len(seen) != 1 or seen[0].shape[:2] != x.shape[:2]:
        raise UnsupportedModelError(f"{what}: its keys were not found where they were looked for")
    if reason:
        raise UnsupportedModelError(f"{what} by the attention that its tokens gather: {reason}")
    halved = parts is not None and has_halves(module, *parts, x, kwargs)
    return Block(module, parts[0] if halved and parts is not None else None, keys, logits, names)
