"""AIM: merge visual tokens before the language model, drop them progressively inside it (Zhong et al., ICCV 2025, arXiv
2412.03248)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tokenprune import ops
from tokenprune.errors import OptionError
from tokenprune.methods.base import Method
from tokenprune.methods.options import (
    keep_check,
    layers_or_depths,
    must_be,
    no_keep,
    one_of,
    option,
    or_none,
    true_or_false,
)
from tokenprune.reduction import Keep, Merge
from tokenprune.schedule import count, is_number
from tokenprune.signals import Budget, LayerSignals, Probe, Signals, Stage


def _prune_check(name: str, prune: Any) -> None:
    """The check of an ascending pair of layers or of depths."""
    ends = layers_or_depths(prune)
    if len(ends) != 2:
        raise OptionError(
            f"prune must be a pair of ints (layers) or of floats (relative to the depth), or None, got {prune!r}"
        )
    if not 0 <= ends[0] < ends[1] or (isinstance(ends[1], float) and ends[1] > 1.0):
        raise OptionError(f"prune=(start, end) needs 0 <= start < end (and end <= 1.0 for floats), got {prune!r}")


_IMPORTANCE = one_of("pagerank", "column_sum", "last_query")
_ABOVE_0 = must_be("a number above 0", lambda value: is_number(value) and 0 < value < math.inf)


@dataclass(frozen=True, kw_only=True)
class AIM(Method):
    """Merging by similarity before the decoder (section 3.2 of the paper), pruning by importance inside it (3.3).

    Before the decoder the tokens of each image (frame) are split by turns into sources and destinations; the most
    similar sources are averaged into their best destination, in rounds that halve the tokens, until `merge` of them are
    left. A group stands at its destination's place. Inside the decoder fewer and fewer of the visual tokens of a row
    are kept, the most important ones: all of them up to layer `start`, none after layer `end`, linearly between.

    The published settings are `AIM()` for images (`merge=0.125`, `prune=(13/32, 21/32)`) and :meth:`for_video`
    (`merge=0.25`, `prune=(14/28, 22/28)`), with depths relative to the decoder's, so that they fit any model.

    All tokens of the prompt take part in ranking; drafts that assisted decoding adds to its call do not.

    Departures from the authors' release: merged tokens keep their spatial order, where the release puts the sources
    that are left before the destinations, so that a round with an odd number of tokens leads to other groups in the
    next one; `merge` is a fraction of all tokens, rounded half up, where the release halves and rounds in every round;
    and tokens are really dropped, where the release masks them.

    Args:
        merge: fraction of the tokens of each image (frame) left after merging, in (0, 1], or a count; None: no merging.
        prune: `(start, end)`: the first layer after which tokens are dropped and the first one after which none is
            left; as floats in [0, 1] relative to the decoder's depth, as ints indices of layers; None: no pruning.
        importance: `"pagerank"`: five steps of a random walk over the attention of the layer, as in the paper;
            `"column_sum"`: attention received; `"last_query"`: attention received from the last token, much the
            cheapest.
        temperature: what attention logits are divided by before the softmax of the importance.
        size_weighted: whether a merged token counts in later rounds as often as it has tokens. The paper: no.
        size_bias: whether the decoder's attention sees a merged token as often as it has tokens: the log of their
            number is added to the logits, which needs `sdpa` or `eager` attention. The paper: no.

    Raises:
        OptionError: an option is out of range, or both `merge` and `prune` are None.
    """

    name: ClassVar[str] = "aim"

    keep: float | int | str = no_keep(
        "aim", "merge (what is left before the decoder) and prune (from which layer to which)"
    )
    merge: float | int | None = option(0.125, or_none(keep_check))
    prune: tuple[float, float] | None = option((13 / 32, 21 / 32), or_none(_prune_check))
    importance: str = option("pagerank", _IMPORTANCE)
    temperature: float = option(0.1, _ABOVE_0)
    size_weighted: bool = option(False, true_or_false)
    size_bias: bool = option(False, true_or_false)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge is None and self.prune is None:
            raise OptionError("merge and prune are both None, so that nothing would be done; give one of them")

    @classmethod
    def for_video(cls, **options: object) -> "AIM":
        """The published setting for video: a quarter of each frame, and pruning from the middle of the decoder."""
        return cls(**{"merge": 0.25, "prune": (14 / 28, 22 / 28), **options})  # type: ignore[arg-type]

    def sites(self) -> tuple[str, ...]:
        """Names of the sites at which this method takes part."""
        given = {"before_llm": self.merge is not None, "llm_layer": self.prune is not None}
        return tuple(site for site, wanted in given.items() if wanted)

    def budget(self, n_tokens: int) -> Budget:
        """How many of the `n_tokens` tokens of an image are left after merging."""
        n_left = n_tokens if self.merge is None else count(self.merge, n_tokens)
        return Budget(n_left, n_left)

    @property
    def biased(self) -> bool:
        """Whether attention sees the size of a group."""
        return self.size_bias and self.merge is not None

    def before_llm(self, signals: Signals, budget: Budget) -> Merge:
        """Merge `signals.features` `[B, N, D]` in rounds, each of which takes at most every source."""
        features, n_left = signals.features, budget.high
        n_rows, n_tokens = features.shape[:2]
        everything = torch.arange(n_tokens, dtype=torch.int64, device=features.device).expand(n_rows, -1)
        merge, step, means = Merge(everything, everything), None, features.float()
        while (n_now := merge.index.shape[1]) > n_left:
            means = means if step is None else step.apply(means)
            match = ops.bipartite_match(means, r=min(n_now - n_left, n_now // 2))
            step = Merge(match.index, match.assign, merge.sizes() if self.size_weighted else None)
            merge = merge.then(step)
        return Merge(merge.index, merge.assign, merge.weight, self.size_bias)

    def schedule(self, n_layers: int) -> tuple[Stage, ...]:
        """Layer l of `start` to `end - 1` passes on `1 - (l - start + 1) / (end - start)` of the visual tokens.

        Raises:
            OptionError: the options do not fit a decoder of this depth.
        """
        if self.prune is None:
            return ()
        start, end = self.prune
        if isinstance(end, float):
            start, end = math.floor(start * n_layers + 0.5), math.floor(end * n_layers + 0.5)
            end = min(max(end, start + 1), n_layers - 1)
            start = min(start, end - 1)
        if not 0 <= start < end <= n_layers - 1:
            raise OptionError(
                f"prune={self.prune!r} means layers {start} to {end}, and a decoder of {n_layers} layers can drop "
                f"tokens after layers 0 to {n_layers - 2}: give 0 <= start < end <= {n_layers - 1}"
            )
        return tuple(Stage(layer, 1 - (layer - start + 1) / (end - start)) for layer in range(int(start), int(end)))

    @property
    def probe(self) -> Probe | None:
        """The importance scores that `llm_layer` sees."""
        return Probe(self.importance, float(self.temperature)) if self.prune is not None else None

    def llm_layer(self, signals: LayerSignals, budget: Budget) -> Keep:
        """The most important of the tokens of `signals.importance` `[R, N]`."""
        return Keep(ops.top_k_select(signals.importance, k=budget.high))
