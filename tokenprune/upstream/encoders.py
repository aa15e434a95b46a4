"""Vision encoders: which one a model is or holds, and the calls of their blocks.

Encoders are found by the names of the classes a module descends from, so nothing is imported to find out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokenprune.errors import InputError
from tokenprune.reduction import gather
from tokenprune.upstream import hf_vit, timm_vit
from tokenprune.upstream.calls import bind, refuse_unknown
from tokenprune.upstream.check import look_up, missing, version_of
from tokenprune.upstream.tower import Tower, shorten_rope

TOWERS: tuple[Tower, ...] = (*timm_vit.TOWERS, *hf_vit.TOWERS)
_REFUSED = {**timm_vit.REFUSED, **hf_vit.REFUSED}

ONE_TO_ONE: Mapping[str, str] = {"llava": "vision_feature_layer", "paligemma": "", "vipllava": "vision_feature_layer"}
"""Families each of whose visual tokens is one patch of a tower that can be reduced, and the field of their config that
says which of the tower's layers are handed on; "" where it is the last one."""


def towers_of(model: nn.Module) -> list[tuple[nn.Module, Tower]]:
    """The vision encoders that `model` is or holds, with their rows."""
    found: list[tuple[nn.Module, Tower]] = []
    for module in model.modules():
        classes = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(module).__mro__}
        tower = next((row for row in TOWERS if any((row.library, host) in classes for host in row.hosts)), None)
        if tower is not None and not any(module in set(host.modules()) for host, _ in found):
            found.append((module, tower))
    return found


def tower_of(model: nn.Module) -> tuple[nn.Module, Tower]:
    """The only vision encoder that `model` holds, with its row.

    Raises:
        UnsupportedModelError: there is none that is known, or there are several.
    """
    found = towers_of(model)
    if len(found) != 1:
        wanted = ["one of", *(host for tower in TOWERS for host in tower.hosts if tower.library == "transformers")]
        seen = [type(one).__name__ for one in model.modules() if isinstance(one, nn.Module) and hasattr(one, "config")]
        raise missing("vision tower", of=type(model).__name__, wanted=wanted, seen=dict.fromkeys(seen))
    return found[0]


def encoder_refusal(model: nn.Module) -> str | None:
    """Why the vision encoder that `model` is cannot be reduced; None where nothing is known against it."""
    return next((_REFUSED[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _REFUSED), None)


def projector_of(root: Any) -> nn.Module:
    """What takes the vision encoder's tokens to the width of the text decoder in a multimodal model.

    Raises:
        UnsupportedModelError: there is no such module.
    """
    found: nn.Module = look_up(root, "multi_modal_projector", role="projector")
    return found


def n_used(root: Any, family: str, n_blocks: int) -> int:
    """How many blocks of the tower take part in what the projector gets.

    Raises:
        UnsupportedModelError: the config does not say.
    """
    if not ONE_TO_ONE[family]:
        return n_blocks
    layers = look_up(root, f"config.{ONE_TO_ONE[family]}", role="number of the layer that the vision tower hands on")
    return max(int(layer) % (n_blocks + 1) for layer in (layers if isinstance(layers, list | tuple) else [layers]))


class BlockCall:
    """What a block of a vision encoder, or its attention, is called with.

    Args:
        tower: the row of the encoder.
        names: what the arguments of the forward are called; the first one are the hidden states.
        args: what it is called with.
        kwargs: likewise.

    Attributes:
        states: hidden states `[B, N, D]`.
        others: all other arguments, by upstream's names.

    Raises:
        InputError: it has no hidden states, or more arguments than names.
    """

    def __init__(self, tower: Tower, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = bind(names, args, kwargs)
        if len(args) > len(names) or not isinstance(given.get(names[0]), Tensor):
            raise InputError(
                f"a block of a vision encoder was called with {len(args)} arguments and {', '.join(kwargs) or 'no'} "
                f"keywords; looked for were hidden states as {names[0]!r}, the first of {', '.join(names)}; "
                f"{tower.library} {version_of(tower.library)}"
            )
        self.tower = tower
        self.states: Tensor = given.pop(names[0])
        self.others: dict[str, Any] = given

    @property
    def mask(self) -> Any:
        """What is added to the attention logits, or None."""
        return self.others.get(self.tower.mask)

    @property
    def hides(self) -> bool:
        """Whether the mask hides a token from another or favours one."""
        if not isinstance(self.mask, Tensor):
            return self.mask is not None
        return not bool(self.mask.all()) if self.mask.dtype == torch.bool else bool(self.mask.any())

    @property
    def rope(self) -> Any:
        """Rotary embeddings of the patches, or None."""
        return self.others.get(self.tower.rope)

    @property
    def is_causal(self) -> bool:
        """Whether tokens see those before them only."""
        return bool(self.others.get("is_causal"))

    def shorten(self, index: Tensor | None, *, n_prefix: int, length: int, mask: Tensor | None) -> None:
        """Shorten everything beside the hidden states to the tokens that are kept.

        Args:
            index: `[B, M]`, where they stood among those that entered the first block; None where all are kept.
            n_prefix: tokens before the patches.
            length: tokens that entered the first block.
            mask: what is to be added to the attention logits, `[B, 1, 1, M]`.

        Raises:
            UnsupportedModelError: an argument holds tensors, and it is not known for which tokens.
        """
        ours = [name for name in (self.tower.mask, self.tower.rope) if name]
        for name, value in [item for item in self.others.items() if item[0] not in ours]:
            if isinstance(value, Tensor) and value.shape[:2] == (len(self.states), length):
                self.others[name] = value if index is None else gather(value, index)
            else:
                of, known = (
                    f"a block of a vision encoder ({self.tower.name})",
                    f"; known are {', '.join(map(repr, ours))}",
                )
                refuse_unknown(name, value, of=of, known=known, library=self.tower.library)
        if index is None:
            return
        if self.tower.mask in self.others or mask is not None:
            self.others[self.tower.mask] = mask
        if self.rope is not None:
            self.others[self.tower.rope] = shorten_rope(self.rope, index[:, n_prefix:] - n_prefix)


def lengths_in(output: Any, width: int) -> set[int]:
    """Lengths N of the hidden states `[B, N, D]` in what an encoder returned."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return {leaf.shape[1] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim == 3 and leaf.shape[2] == width}
