"""What a text decoder is made of, read off its configuration once when a model is patched."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.upstream.attention import attention_of, checkpoints
from tokenprune.upstream.check import look_up, missing

_RECURRENT = frozenset(("conv", "linear_attention"))
_SLIDING, _FULL = "sliding", "full_attention"
_IMPLEMENTATION = "config._attn_implementation"


class DecoderFacts:
    """Facts about one text decoder.

    Attributes:
        called: the name of its class.
        config: the configuration itself, for upstream's own functions.
        depth: number of layers.
        width: width D of the hidden states.
        kinds: kind of each layer (`full_attention`, `sliding_attention`, ...); None where all are of one kind.
        window: sliding window in tokens, None where there is none.
        recurrent: whether some layers go through the tokens one by one, so that no padding may stand between them.
        mrope: whether its rotary embeddings have several axes.

    Args:
        decoder: the decoder.

    Raises:
        UnsupportedModelError: a fact cannot be found, or two contradict each other.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self.called = type(decoder).__name__
        self.depth = int(look_up(decoder, "config.num_hidden_layers", role="number of layers"))
        self.width = int(look_up(decoder, "config.hidden_size", role="width"))
        look_up(decoder, _IMPLEMENTATION, role="attention implementation")
        self.config: Any = decoder.config
        kinds = getattr(self.config, "layer_types", None)
        self.kinds: tuple[str, ...] | None = tuple(kinds) if kinds else None
        self._slide = [_SLIDING in kind for kind in self.kinds or (_SLIDING,) * self.depth]
        window = getattr(self.config, "sliding_window", None)
        if window is None and self.kinds is not None and any(self._slide):
            raise self._missing("sliding window", "", "sliding_window")
        self.window = int(window) if window is not None and any(self._slide) else None
        self.recurrent = not _RECURRENT.isdisjoint(self.kinds or ())
        self.mrope = "mrope_section" in (getattr(self.config, "rope_parameters", None) or {})

    def _missing(self, role: str, why: str, field: str) -> UnsupportedModelError:
        return missing(role, of=f"the config of {self.called}{why}", wanted=[field], seen=vars(self.config))

    @property
    def implementation(self) -> str:
        """The attention implementation: it may be set anew at any time."""
        return str(self.config._attn_implementation)

    @property
    def flash(self) -> bool:
        """Whether attention is flash attention, which takes 2-D masks."""
        return "flash" in self.implementation

    @property
    def fused(self) -> bool:
        """Whether attention is sdpa."""
        return self.implementation == "sdpa"

    @property
    def eager(self) -> bool:
        """Whether attention is plain torch, which takes additive masks."""
        return self.implementation == "eager"

    def caches(self, wanted: bool | None) -> bool:
        """Whether a call keeps a KV cache; `wanted` is what the caller said, None for nothing."""
        if self._decoder.training and any(map(checkpoints, self._decoder.modules())):
            return False
        return bool(getattr(self.config, "use_cache", False) if wanted is None else wanted)

    def kind_of(self, layer: int) -> str | None:
        """Kind of a layer, None where all are of one kind."""
        return None if self.kinds is None else self.kinds[layer]

    def layer_of(self, kind: str | None) -> int:
        """First layer of the kind of a mask's key; 0 where there is one mask for all layers.

        Raises:
            UnsupportedModelError: masks come by kinds of layers that this decoder does not know.
        """
        if kind is None:
            return 0
        if self.kinds is None:
            raise self._missing("kinds of layers", f", whose masks come by kind ({kind}),", "layer_types")
        return self.kinds.index(kind) if kind in self.kinds else 0

    def first_layers(self) -> dict[str, int]:
        """For each kind its first layer; empty unless there are several kinds."""
        kinds = self.kinds or ()
        return {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)} if len(set(kinds)) > 1 else {}

    def is_recurrent(self, kind: str | None) -> bool:
        """Whether layers of a kind go through the tokens one by one."""
        return kind in _RECURRENT

    @property
    def positional_caches(self) -> list[str]:
        """Kinds of layers whose caches count by position, so that no entry can be dropped by index."""
        other = sorted({kind for kind in self.kinds or () if kind != _FULL})
        return other or (["sliding_attention"] if self.window is not None else [])

    def check_layers(self, layers: Sequence[nn.Module]) -> None:
        """Check that the layers are what the configuration says.

        Raises:
            UnsupportedModelError: some have no attention that is recognised, and no kind says why.
        """
        bare = [i for i, layer in enumerate(layers) if attention_of(layer) is None]
        if bare and len(bare) < len(layers) and self.kinds is None:
            raise self._missing("kinds of layers", f", whose layers {bare} have no attention,", "layer_types")

    def check_windows(self, windows: Sequence[int | None]) -> None:
        """Check that the layers of a cache that upstream made for this decoder slide where it does.

        Raises:
            UnsupportedModelError: they do not.
        """
        sliding = [i for i, window in enumerate(windows) if window is not None]
        wrong = [i for i in sliding if self.window is None or not self._slide[i]]
        if wrong:
            raise UnsupportedModelError(
                f"layers {', '.join(map(str, wrong))} of the KV cache keep a window of {windows[wrong[0]]} tokens, and "
                f"the config of {self.called} has no window for them (kinds of layers: {self.kinds}, window: "
                f"{self.window}), so masks cannot be made for a pruned prompt"
            )


def layers_of(decoder: nn.Module) -> list[nn.Module] | None:
    """The decoder's layers, None where they are not found."""
    depth = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    lists = (list(child) for child in decoder.children() if isinstance(child, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == depth), None)
