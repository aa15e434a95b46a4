"""SpAtten: cascade pruning of tokens and heads by their scores so far (Wang et al., HPCA 2021, arXiv 2012.09852)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar

import torch

from tokenprune import ops
from tokenprune.errors import OptionError
from tokenprune.methods.base import Method
from tokenprune.methods.options import at_least, must_be, no_keep, one_of, option, true_or_false
from tokenprune.reduction import Keep
from tokenprune.schedule import is_number, ramp, share
from tokenprune.signals import AttentionPlan, BlockSignals, Budget, CachePlan, LayerSignals, Probe, Stage, TextGuard

FREE_TOKENS = 0.15  # of the layers, the first ones, keep all tokens (section V-A of the paper)
FREE_HEADS = 0.30  # and all heads
SCORE = Probe("column_sum", cumulative=True)


def _are_fractions(value: Any) -> bool:
    """Whether `value` is a fraction in (0, 1] or a sequence of fractions in [0, 1]."""
    if isinstance(value, Sequence):
        return len(value) > 0 and all(is_number(one) and 0 <= one <= 1 for one in value)
    return is_number(value) and 0 < value <= 1


_FRACTIONS = must_be("a fraction in (0, 1] or a sequence with a fraction for each layer", _are_fractions)


def _falling_fractions(name: str, value: Any) -> None:
    """The check of what falls with depth."""
    _FRACTIONS(name, value)
    if isinstance(value, Sequence) and (value[0] != 1.0 or sorted(value, reverse=True) != list(value)):
        raise OptionError(
            f"{name} as a sequence starts with 1.0 (the first layer sees everything) and never grows, because what "
            f"one layer drops no later layer sees; got {value!r}"
        )


_PROBABILITY = must_be("a probability from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)


@dataclass(frozen=True, kw_only=True)
class SpAtten(Method):
    """Cascade token pruning (section III-A of the paper): a token that one layer drops no later layer sees.

    A token's score is the attention it receives, summed over heads and queries and added up over layers and decoding
    steps. After each layer the tokens with the highest scores are kept, `floor(n * fraction)` of the n prunable ones
    that entered the decoder. The paper fine-tunes its models for this; here it runs without training, on visual tokens
    only by default. With `protect_text=False`, and for heads, drafts of an assistant count as they come, rejected ones
    too: what is pruned while tokens are generated may differ from decoding without one.

    A model that is a vision encoder drops patches between attention and MLP of its blocks. Class, distillation and
    register tokens are kept, and so is one patch at least. Behind its last block, and wherever other code sees what a
    block returns, a dropped patch has the value of the nearest kept one before it. Heads are dropped from its blocks as
    from a decoder's layers, here with their keys and values; tokens are then scored, and keys that another method
    merges by are averaged, over the kept heads. That needs an attention that is nothing but projections around a
    softmax.

    Args:
        tokens: average fraction of the tokens kept over the layers, in (0, 1], falling with depth from everything in
            the first 15 % of the layers; or a sequence with a fraction for each layer, the first one 1.0, none larger
            than the one before.
        heads: average fraction of the heads kept over the layers, in (0, 1], falling with depth from all of them in the
            first 30 % of the layers; or a sequence as for `tokens`. A head's score is the sum of the absolute values of
            its output, added up over layers and decoding steps; the output of a dropped head is zero. Prompts compute
            the attention of kept heads alone. Where all rows of the batch keep the same heads, query and output
            projections are sliced too: in prompts and, once a layer's heads are those of the step before, in decoding
            steps. That needs plain linear layers; the report says where there are others. Keys and values of dropped
            heads stay in the cache.
        values: fraction of the values that each head reads in a decoding step, those with the largest probabilities
            (section III-B of the paper), in (0, 1]; or a sequence with a fraction for each layer. Prompts read all:
            there, arithmetic is the cost, not reading.
        quantize: `"4+4"`: keys and values are kept in two planes of four bits (section III-D of the paper). A decoding
            step reads the high plane; a head whose largest probability is then under `threshold`, so that its
            distribution is flat, reads the low one too. Needs a growing cache, as ``generate`` makes one. None: as they
            come.
        threshold: see `quantize`, in [0, 1].
        protect_text: whether only visual tokens are prunable. False: text is too, in the prompt and, while tokens are
            generated, in the KV cache; models without images can then be patched.
        keep_first: with `protect_text=False`, tokens at the beginning of a row that are always kept.
        keep_recent: with `protect_text=False`, tokens at its end that are always kept, at least 1.
        kv: with `protect_text=False`, whether what is pruned while tokens are generated is dropped from the KV cache
            for good (`"persistent"`) or only masked, chosen in each step anew from all of it (`"per_step"`, as in the
            paper's traces; the prompt is not pruned then).
        interval: with `kv="persistent"`, a row's cache is pruned whenever the row's length reaches or passes a multiple
            of this.

    Raises:
        OptionError: an option is out of range.
    """

    name: ClassVar[str] = "spatten"

    keep: float | int | str = no_keep("spatten", "tokens (kept on average over the layers)")
    tokens: float | Sequence[float] = option(0.8, _falling_fractions)
    heads: float | Sequence[float] = option(1.0, _falling_fractions)
    values: float | Sequence[float] = option(1.0, _FRACTIONS)
    quantize: str | None = option(None, one_of("4+4", None))
    threshold: float = option(0.1, _PROBABILITY)
    protect_text: bool = option(True, true_or_false)
    keep_first: int = option(4, at_least(0))
    keep_recent: int = option(32, at_least(1))
    kv: str = option("persistent", one_of("persistent", "per_step"))
    interval: int = option(16, at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protect_text and self.kv == "per_step":
            raise OptionError(
                "kv='per_step' passes over KV entries of text while tokens are generated, and protect_text=True keeps "
                "them all; give protect_text=False"
            )

    def in_encoder(self) -> "SpAtten":
        """The cascade over patches.

        Raises:
            OptionError: values, bits or text are to be pruned, which an encoder has no site for.
        """
        return EncoderSpAtten(**{one.name: getattr(self, one.name) for one in fields(self)})

    def fractions(self, n_layers: int) -> tuple[float, ...]:
        """Fraction of the prunable tokens that each of `n_layers` layers keeps.

        Raises:
            OptionError: a sequence was given that does not fit the depth.
        """
        return _by_layer("tokens", self.tokens, n_layers, free=FREE_TOKENS)

    def attention_plan(self, n_layers: int) -> AttentionPlan | None:
        """Which heads, values and bits are omitted, None where all are kept.

        Raises:
            OptionError: a sequence was given that does not fit the depth.
        """
        heads = _by_layer("heads", self.heads, n_layers, free=FREE_HEADS)
        values = _by_layer("values", self.values, n_layers, free=None)
        threshold = None if self.quantize is None else float(self.threshold)
        if min(*heads, *values) == 1.0 and threshold is None:
            return None
        return AttentionPlan(heads, values, threshold)

    def schedule(self, n_layers: int) -> tuple[Stage, ...]:
        """After each layer that is followed by one that keeps less."""
        kept = self.fractions(n_layers)
        if self.kv == "per_step":
            return ()
        return tuple(Stage(i, kept[i + 1], round_down=True) for i in range(n_layers - 1) if kept[i + 1] < kept[i])

    @property
    def probe(self) -> Probe | None:
        """Attention received, added up over the layers."""
        return SCORE

    @property
    def text(self) -> TextGuard | None:
        """Which text is always kept where text is prunable."""
        return None if self.protect_text else TextGuard(self.keep_first, self.keep_recent)

    def cache_plan(self, n_layers: int) -> CachePlan | None:
        """What is dropped from the KV cache while tokens are generated: text, if it is prunable."""
        kept = self.fractions(n_layers)
        if self.text is None or min(kept) == 1.0:
            return None
        return CachePlan(kept, self.text, self.interval, self.kv == "persistent", SCORE)

    def llm_layer(self, signals: LayerSignals, budget: Budget) -> Keep:
        """Those of the tokens of `signals.importance` `[R, N]` that have received most attention."""
        return Keep(ops.top_k_select(signals.importance, k=budget.high))


class EncoderSpAtten(SpAtten):
    """The cascade in a model that is a vision encoder: options are those of :class:`SpAtten`, of which `tokens` and
    `heads` count.

    Raises:
        OptionError: another option asks for what an encoder does not have.
    """

    uses_attention_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.values if isinstance(self.values, Sequence) else [self.values]
        if min(values) < 1.0:
            raise OptionError(
                f"values={self.values!r} was asked for, but vision encoders have no decoding steps that read values; "
                "values=1.0 works here"
            )
        if not self.protect_text:
            raise OptionError("protect_text=False was asked for, but vision encoders have no text; leave it out")
        if self.quantize is not None:
            raise OptionError(f"quantize={self.quantize!r} was asked for, but vision encoders have no KV cache")

    def sites(self) -> tuple[str, ...]:
        """Inside the encoder alone."""
        return ("encoder_block",)

    def removals(self, *, n_layers: int, n_tokens: int) -> tuple[int, ...]:
        """What each block drops so that the next one gets its fraction, at least one patch.

        Raises:
            OptionError: a sequence was given that does not fit the depth.
        """
        kept = self.fractions(n_layers)
        counts = [max(min(1, n_tokens), share(one, n_tokens, round_down=True)) for one in (*kept, kept[-1])]
        return tuple(before - after for before, after in pairwise(counts))

    def encoder_block(self, signals: BlockSignals, budget: Budget) -> Keep:
        """The protected tokens, and those of the others with the highest `signals.importance` `[B, N]`."""
        assert signals.importance is not None
        n_prefix = int(signals.protected.sum())
        best = ops.top_k_select(signals.importance[:, n_prefix:], k=budget.high - n_prefix) + n_prefix
        prefix = torch.arange(n_prefix, dtype=torch.int64, device=best.device).expand(len(best), -1)
        return Keep(torch.cat([prefix, best], 1))


def _by_layer(name: str, kept: float | Sequence[float], n_layers: int, *, free: float | None) -> tuple[float, ...]:
    """A fraction for each layer, out of an average (`free`: fraction of the layers that keep all; None: no ramp)."""
    if isinstance(kept, int | float):
        return (float(kept),) * n_layers if free is None else ramp(float(kept), n_layers=n_layers, free=free)
    if len(kept) != n_layers:
        raise OptionError(f"{name} gives {len(kept)} layers a fraction, and there are {n_layers}")
    return tuple(map(float, kept))
