"""What every method has in common."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from tokenprune.errors import OptionError
from tokenprune.methods.options import check_options
from tokenprune.schedule import count, removals_for
from tokenprune.signals import SITES, AttentionPlan, Budget, CachePlan, Probe, Stage, TextGuard


@dataclass(frozen=True, kw_only=True)
class Method:
    """A frozen set of hyper-parameters that takes part at the sites whose names it defines as functions.

    A site function is pure, and what it keeps of an image (a row) depends on that image (row) and the options alone:

    * `encoder_block(self, signals: BlockSignals, budget: Budget) -> Keep | Merge`: sees all rows of a vision encoder's
      batch, in each of the blocks in which :meth:`removals` drops or merges tokens;
    * `before_llm(self, signals: Signals, budget: Budget) -> Keep | Merge`: sees the images of one size as one batch;
    * `llm_layer(self, signals: LayerSignals, budget: Budget) -> Keep`: sees the rows with equally many visual tokens as
      one batch, after each of the layers that :meth:`schedule` names.

    An option may declare what it may be (:func:`tokenprune.methods.options.option`). A class without a `name` has its
    own as one.

    Args:
        keep: float in (0, 1] = fraction of the visual tokens kept of each image (of each frame for video), int >= 1 =
            tokens kept. An image is what the caller gave, with all tiles, views and lines that its processor makes of
            it; a frame is what the model makes of one or, where it merges them, of two. Where the prompt does not tell
            where an image or a frame ends, the trace has a note.

    Raises:
        OptionError: an option is out of range.
    """

    name: ClassVar[str] = ""
    uses_attention_scores: ClassVar[bool] = False
    """Whether `encoder_block` ranks tokens by the attention that they receive; it may then drop more than half."""
    proportional = False
    """Whether a vision encoder's attention is to see how many tokens each group has that `encoder_block` merges."""
    restore = True
    """Whether what leaves a vision encoder has all tokens again, each with the value of its group."""
    backend = "auto"
    """Backend of the ops that merge tokens, see :mod:`tokenprune.ops`."""

    keep: float | int | str = 0.25

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.name in ("", *(parent.__name__ for parent in cls.__mro__[1:])):  # nobody has chosen a name
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        check_options(self)

    def sites(self) -> tuple[str, ...]:
        """Names of the sites at which this method takes part."""
        return tuple(site for site in SITES if callable(getattr(self, site, None)))

    def in_encoder(self) -> "Method":
        """This method as it takes part in a model that is a vision encoder.

        Raises:
            OptionError: it has options that mean nothing there.
        """
        return self

    def budget(self, n_tokens: int) -> Budget:
        """How many of the `n_tokens` tokens of an image are to be kept."""
        assert not isinstance(self.keep, str)  # a child that allows a word overrides this function
        n_keep = count(self.keep, n_tokens)
        return Budget(n_keep, n_keep)

    @property
    def biased(self) -> bool:
        """Whether the decoder's attention is to see how many tokens each group has that `before_llm` merges."""
        return False

    def removals(self, *, n_layers: int, n_tokens: int) -> tuple[int, ...]:
        """How many of an image's `n_tokens` patches each of an encoder's `n_layers` blocks drops or merges into others.

        Raises:
            OptionError: the options do not fit such an encoder.
        """
        assert not isinstance(self.keep, str)
        return removals_for(self.keep, n_layers=n_layers, n_tokens=n_tokens)

    def schedule(self, n_layers: int) -> tuple[Stage, ...]:
        """After which of the decoder's `n_layers` layers the method drops tokens, in order. One with `llm_layer` has to
        say it.

        Raises:
            OptionError: the options do not fit a decoder of this depth.
        """
        if "llm_layer" in self.sites():
            raise OptionError(
                f"method {type(self).__name__} has llm_layer but does not say after which layers it is asked; define "
                "schedule(self, n_layers), which returns a Stage(layer, keep) for each"
            )
        return ()

    @property
    def probe(self) -> Probe | None:
        """The importance scores that `llm_layer` sees: by default the attention from the last token, the cheapest."""
        return Probe("last_query") if "llm_layer" in self.sites() else None

    @property
    def text(self) -> TextGuard | None:
        """Which text is kept where the method prunes text too; None where it prunes visual tokens only."""
        return None

    def attention_plan(self, n_layers: int) -> AttentionPlan | None:
        """What the method omits from every attention of the decoder or, inside an encoder, of the encoder."""
        return None

    def cache_plan(self, n_layers: int) -> CachePlan | None:
        """What the method drops from the KV cache while tokens are generated."""
        return None


def options_of(method: type[Method]) -> dict[str, Any]:
    """The options of a method with their defaults, except those that its fields hide (`repr=False`)."""
    return {entry.name: entry.default for entry in fields(method) if entry.repr}
