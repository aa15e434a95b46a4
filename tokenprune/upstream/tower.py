"""What has to be known of a kind of vision encoder: one declarative row each, and how its roles are found.

A role is found by looking, when a model is patched; one that is not there under any name known raises, and the error
says what is there.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.reduction import gather
from tokenprune.upstream.check import child as child
from tokenprune.upstream.check import look_up, missing, seen_in

WINDOWS = "its attention looks at windows of the grid, which merged tokens no longer make"
STAGES = "its stages pool the grid, which merged tokens no longer make"
CONVOLUTIONS = "it is a convolutional network: it has a grid in stages and no tokens"
RELATIVE = "its attention adds a table of relative positions of the whole grid, which cannot follow tokens merged"
"""Why encoders of several kinds are refused."""
_TRIED = 6  # patches that a block is tried on


@dataclass(frozen=True)
class Keys:
    """Where a block's keys (or queries) are read.

    Attributes:
        module: what gets the hook.
        kind: `"pre"` or `"post"`.
        read: from the module's input (`"pre"`) or output to the keys averaged over the heads, `[B, N, K]`; to those of
            every head, `[B, H, N, K]`, in a :class:`Logits`.
        mean: in a :class:`Logits`, to the keys averaged over the heads where there is a cheaper way.
    """

    module: nn.Module
    kind: str
    read: Callable[[Tensor], Tensor]
    mean: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Logits:
    """What a block's attention logits are made of.

    Attributes:
        query: where its queries are read.
        key: where its keys are read.
        scale: factor of the logits.
        rotate: applies the block's rotary embeddings to queries or keys `[B, H, N, K]`; None where it has none.
    """

    query: Keys
    key: Keys
    scale: float
    rotate: Callable[[Tensor, Any], Tensor] | None = None

    def turned(self, x: Tensor, rope: Any) -> Tensor:
        """Queries or keys `[B, H, N, K]` as the attention compares them."""
        return x if rope is None or self.rotate is None else self.rotate(x, rope).to(x.dtype)


@dataclass(frozen=True)
class Attending:
    """What an attention is made of, beside the scale and the rotation of its logits. Modules and parameters are named.

    Attributes:
        inward: its projections: one for queries, keys and values in a row, or one for each.
        outward: its output projection, which takes the heads side by side.
        n_heads: how many heads it has.
        biases: what is added to queries, keys and values behind a fused projection; () where nothing is.
        norms: norms of the queries and of the keys `[B, H, N, K]`; () where there are none.
        last: what follows the output projection.
        dropout: how likely a probability is dropped in training.
        paired: whether it gives its probabilities too where an implementation has them, and else None.
        plain: whether it has its probabilities now: its implementation is not fused.
    """

    inward: tuple[str, ...]
    outward: str
    n_heads: int
    biases: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    dropout: Callable[[Any], float] = lambda attention: 0.0
    paired: bool = False
    plain: Callable[[Any], bool] = lambda attention: False


@dataclass(frozen=True)
class Tower:
    """Encoders of one kind.

    Attributes:
        name: name of the family.
        hosts: names of the classes that hold the blocks.
        paths: where the list of blocks stands in a host; the first one that exists counts.
        parts: names of a block's norm before attention, attention, norm before the MLP, and MLP.
        prefix: tokens before the patches (class, distillation, registers).
        library: the package that its classes come from.
        mask: argument of a block that is added to the attention logits.
        logits: finds what a block's attention logits are made of; None where that is not known.
        attending: finds what the attention among `parts` is made of, or why it cannot do with fewer heads.
        size: where the width D of the hidden states stands in a host.
        flag: attribute of a host or of a module in it that says whether gradient checkpointing is on.
        turn_off: the call of a model that turns it off.
        patches: patches of an image, 0 where that is open.
        rope: argument of a block that holds rotary embeddings of the patches; "" where there is none.
        sample_rope: rotary embeddings for patches `[N, D]`, to try a block on; None where the host has none.
        pooled: whether a host's own forward returns what comes of its prefix alone.
        obstacle: why a host cannot be reduced, beside gradient checkpointing; "" where it can.
        implementation: name of the host's attention implementation.
    """

    name: str
    hosts: tuple[str, ...]
    paths: tuple[str, ...]
    parts: tuple[str, str, str, str]
    prefix: Callable[[Any], int]
    library: str
    mask: str
    logits: Callable[[nn.Module], Logits | None]
    attending: Callable[[nn.Module], Attending | str]
    size: str
    flag: str
    turn_off: str
    patches: Callable[[Any], int]
    rope: str = ""
    sample_rope: Callable[[Any, Tensor], Any] = lambda host, x: None
    pooled: Callable[[Any], bool] = lambda host: False
    obstacle: Callable[[Any], str] = lambda host: ""
    implementation: Callable[[Any], str] = lambda host: "sdpa"

    def blocks(self, host: nn.Module) -> list[nn.Module]:
        """The blocks of a host, in order.

        Raises:
            UnsupportedModelError: there are none where they are looked for.
        """
        found = next((list(one.children()) for path in self.paths if (one := child(host, path)) is not None), [])
        if not found:
            raise self.lacking("list of blocks", host, self.paths)
        return found

    def width(self, host: nn.Module) -> int:
        """Width D of the hidden states of a host."""
        return int(look_up(host, self.size, role="width", library=self.library))

    def refusal(self, host: nn.Module) -> str:
        """Why a host cannot be reduced, "" where it can.

        Raises:
            UnsupportedModelError: it does not say whether gradient checkpointing is on.
        """
        flags = [getattr(module, self.flag) for module in host.modules() if hasattr(module, self.flag)]
        if not flags:
            seen = sorted({name for module in host.modules() for name in seen_in(module)})
            raise missing("flag of gradient checkpointing", of=type(host).__name__, wanted=[self.flag], seen=seen,
                          library=self.library)  # fmt: skip
        if any(flags):
            return (
                "gradient checkpointing would run its blocks a second time without their place in the forward; turn it "
                f"off with model.{self.turn_off}"
            )
        return self.obstacle(host)

    def keys(self, block: nn.Module) -> Keys | None:
        """Where a block's keys `[B, N, K]` are read, averaged over the heads; None where it has none."""
        logits = self.logits(block)
        if logits is None:
            return None
        key = logits.key
        return Keys(key.module, key.kind, key.mean or (lambda x: averaged(key.read(x), 1)))

    def second_half(self, block: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """A block's norm before the MLP and its MLP, None where it is made of other parts altogether.

        Raises:
            UnsupportedModelError: it has some of the parts, but not those.
        """
        if all(child(block, path) is None for path in self.parts):
            return None
        norm = look_up(block, self.parts[2], role="norm before the MLP", library=self.library)
        return norm, look_up(block, self.parts[3], role="MLP", library=self.library)

    def check_arguments(self, host: nn.Module, block: nn.Module, *, counts: bool) -> None:
        """Check that a block's forward takes what reducing its tokens needs.

        Args:
            host: the encoder.
            block: the block.
            counts: whether its attention is to count tokens by their sizes, through its mask.

        Raises:
            UnsupportedModelError: an argument is missing.
        """
        turns = self.sample_rope(host, torch.zeros(1, 1, dtype=torch.float32, device="cpu")) is not None
        mask = "argument for an attention mask, which sizes of tokens take (proportional=False works)"
        seen, of = inspect.signature(block.forward).parameters, f"the forward of {type(block).__name__}"
        for role, name, needed in ((mask, self.mask, counts), ("argument for rotary embeddings", self.rope, turns)):
            if needed and name not in seen:
                raise missing(role, of=of, wanted=[name], seen=seen, library=self.library)

    def sample(self, host: nn.Module, block: nn.Module, number: int) -> tuple[Tensor, dict[str, Any]]:
        """Random hidden states for a block, and what else it takes, with no mask."""
        weight, n_tokens = next(block.parameters()), self.prefix(host) + _TRIED
        device = weight.device
        if device.type == "meta":  # accelerate brings the weights in when the block runs
            devices = (getattr(getattr(one, "_hf_hook", None), "execution_device", None) for one in block.modules())
            device = torch.device(next((one for one in devices if one is not None), "cpu"))
        generator = torch.Generator(device="cpu").manual_seed(number)
        shape = (2, n_tokens, self.width(host))
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, weight.dtype)
        rope = self.sample_rope(host, x[0, -_TRIED:])
        kwargs = {self.mask: None} if self.mask in inspect.signature(block.forward).parameters else {}
        return x, kwargs if rope is None else {**kwargs, self.rope: rope}

    def lacking(self, role: str, module: nn.Module, wanted: Any) -> UnsupportedModelError:
        """The error for a part of a module that is not there under any name known."""
        return missing(role, of=type(module).__name__, wanted=wanted, seen=seen_in(module), library=self.library)


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module's forward is not that of its class, such as where accelerate brings its weights in."""
    return "forward" in module.__dict__ or "_hf_hook" in module.__dict__


def averaged(keys: Tensor, heads: int) -> Tensor:
    """The mean of keys over the axis of the heads, in fp32."""
    return keys.sum(heads, dtype=torch.float32).mul_(1 / keys.shape[heads])


def shorten_rope(rope: Any, index: Tensor) -> Any:
    """Rotary embeddings of the patches at `index` `[B, M]`, with dimensions for the batch and the heads.

    Args:
        rope: `[N, K]`, `[H, N, K]` or `[B, H, N, K]`, or a tuple of such.
        index: `[B, M]` int64.
    """
    if isinstance(rope, tuple):
        return tuple(shorten_rope(part, index) for part in rope)
    rope = rope[(None,) * (4 - rope.ndim)]
    return gather(rope.transpose(1, 2), index).transpose(1, 2)
