"""What a site hands to a method, what a method has to keep, and the trace of what was done.

These records stand between :mod:`tokenprune.methods` and what patches models, which never import each other.
"""

from dataclasses import dataclass

from torch import Tensor

from tokenprune.schedule import share

SITES = ("encoder_block", "before_llm", "llm_layer")
"""Names of the places where a method can take part; a method does so by defining a function of that name."""


@dataclass(frozen=True)
class Signals:
    """What a method sees before the decoder. Images (or frames) of one size are handed over together, as one batch.

    Attributes:
        features: visual tokens as they enter the decoder, `[B, N, D]`, in the model's dtype.
        grid: rows and columns of the token grid (`h * w == N`) where the tokens are one, else None.
        ids: for each image its ordinal within its own row of the batch, so that what a seeded method draws does not
            depend on the rows beside it.
        n_hidden: how many more tokens each image has, which the attention mask hides: a fraction is one of them all.
    """

    features: Tensor
    grid: tuple[int, int] | None
    ids: tuple[int, ...]
    n_hidden: int = 0


@dataclass(frozen=True)
class Probe:
    """Which importance scores a method wants of the attention of a decoder layer.

    Attributes:
        reduction: `"column_sum"`, `"last_query"` or `"pagerank"`, as in :func:`tokenprune.ops.attention_importance`.
        temperature: what logits are divided by before the softmax.
        cumulative: whether the scores of all layers so far are added up.
    """

    reduction: str
    temperature: float = 1.0
    cumulative: bool = False


@dataclass(frozen=True)
class Stage:
    """After which decoder layer a method drops tokens, and how many it keeps.

    Attributes:
        layer: index of the layer, from 0; later layers see what is left.
        keep: float in [0, 1] = fraction of the tokens of a row that entered the decoder and may be dropped, int >= 0 =
            tokens of a row.
        round_down: whether a fraction of a token counts as none (else half a token counts as one).
    """

    layer: int
    keep: float | int
    round_down: bool = False

    def count(self, n_tokens: int) -> int:
        """How many are kept of a row's `n_tokens` tokens that entered the decoder and may be dropped."""
        return share(self.keep, n_tokens, round_down=self.round_down)


@dataclass(frozen=True)
class TextGuard:
    """Which tokens of a row are kept in any case when a method prunes text too.

    Attributes:
        first: tokens at the beginning of the row, padding not counted.
        recent: tokens at its end, at least 1.
    """

    first: int
    recent: int


@dataclass(frozen=True)
class CachePlan:
    """What is dropped from the KV cache while tokens are generated: in each layer, the least important prunable tokens.

    Attributes:
        keep: for each layer the fraction of the prunable tokens that it keeps.
        guard: which tokens are kept in any case, and so not prunable.
        interval: a row is pruned whenever its length reaches or passes a multiple of this.
        persistent: whether entries are dropped for good; else they are only masked, in each step anew.
        probe: by what tokens are ranked.
    """

    keep: tuple[float, ...]
    guard: TextGuard
    interval: int
    persistent: bool
    probe: Probe


@dataclass(frozen=True)
class AttentionPlan:
    """Which heads, values and bits a method omits from every attention of a decoder; inside a vision encoder, heads
    alone.

    Attributes:
        heads: for each layer the fraction of the query heads that it keeps.
        values: for each layer the fraction of the values that each head reads in a decoding step.
        threshold: keys and values are kept in two planes of four bits, and a head reads the low ones where its largest
            probability is below this; None: they are kept as they come.
    """

    heads: tuple[float, ...]
    values: tuple[float, ...]
    threshold: float | None = None


@dataclass(frozen=True)
class Traffic:
    """Bytes of keys and values read while tokens were generated, over all layers, rows and steps so far.

    Each attribute counts what would be read with everything up to it taken into account, so that the quotient of two
    neighbours is the share of one of them.

    Attributes:
        dense: by the unpruned model.
        tokens: without the dropped tokens.
        heads: without the dropped heads, too.
        values: without the values that are not read, too; estimated where some heads of a group read the low bits and
            others do not.
        read: without the bits that are not read, too: what was read.
        steps: attentions of one row that were counted.
        recomputed: share of the kept heads that read the low bits because their distribution was flat, on average over
            these attentions.
    """

    dense: float = 0.0
    tokens: float = 0.0
    heads: float = 0.0
    values: float = 0.0
    read: float = 0.0
    steps: int = 0
    recomputed: float = 0.0


@dataclass(frozen=True)
class LayerSignals:
    """What a method sees after a decoder layer. Rows with equally many visual tokens are handed over together.

    Attributes:
        layer: index of the layer.
        importance: scores of the visual tokens that are left, `[R, N]` fp32, as the method's :class:`Probe` asked;
            zeros where it has none.
    """

    layer: int
    importance: Tensor


@dataclass(frozen=True)
class BlockSignals:
    """What a method sees inside a block of a vision encoder, between attention and MLP.

    Attributes:
        layer: index of the block.
        keys: keys of the block's attention averaged over its heads, before any rotation, `[B, N, K]` fp32.
        sizes: how many tokens each one represents, `[B, N]` fp32; None where nothing was merged yet.
        protected: tokens that are kept, unmerged, in any case (class, distillation, registers), `[N]` bool on the CPU;
            they come first.
        importance: attention that each one has gathered, summed over heads, queries and the blocks so far, this one
            included, `[B, N]` fp32; None unless the method `uses_attention_scores`.
        order: the tokens as ToMe's concatenation orders them, `[B, N]` int64: each merging leaves those at even places
            of it before those at odd ones, behind the protected; None before the first one.
    """

    layer: int
    keys: Tensor
    sizes: Tensor | None
    protected: Tensor
    importance: Tensor | None = None
    order: Tensor | None = None


@dataclass(frozen=True)
class Budget:
    """How many tokens of each image a method has to keep: from `low` to `high`, both included."""

    low: int
    high: int


@dataclass(frozen=True)
class Trace:
    """What happened at one site of one forward. Rows are the rows of the batch.

    Attributes:
        site: name of the site, for instance `before_llm`.
        layer: index of the decoder layer (inside an encoder: of the block), or None where the site stands before all
            layers.
        method: name of the method.
        n_in: visual tokens that reached the site, per row.
        n_out: visual tokens that were kept, per row.
        kept_indices: positions of the kept visual tokens in the unpruned sequence of this call, `[n_out]` int64 on the
            CPU, per row.
        visual_indices: positions of the visual tokens that reached the site, likewise.
        images: visual tokens that reached the site for each image (with all of its tiles) or frame of the row.
        grids: rows and columns of the token grid of each of these images, None where the tokens are not one grid.
        radius: largest cosine distance from a dropped token to its nearest kept one, per row and image, where the
            method knows it.
        status: "applied" or "skipped".
        reason: why the site was skipped, else "".
        note: what else should be known: that it could not be told where one image ends and the next begins; else "".
        assignment: inside an encoder: which of the `n_out` kept tokens represents each source patch, `[B, patches]`
            int64 on the model's device.
        place: inside an encoder: where in the block tokens were reduced.
        overhead_ms: wall time spent at the site: selection, gathering and masks. On a GPU it includes the wait for the
            selection.
    """

    site: str
    layer: int | None
    method: str
    n_in: tuple[int, ...] = ()
    n_out: tuple[int, ...] = ()
    kept_indices: tuple[Tensor, ...] = ()
    visual_indices: tuple[Tensor, ...] = ()
    images: tuple[tuple[int, ...], ...] = ()
    grids: tuple[tuple[tuple[int, int] | None, ...], ...] = ()
    radius: tuple[tuple[float, ...], ...] | None = None
    assignment: Tensor | None = None
    place: str = ""
    status: str = "applied"
    reason: str = ""
    note: str = ""
    overhead_ms: float = 0.0
