"""Whether what the methods ask of a decoder can be had."""

from torch import nn

from tokenprune.errors import OptionError, UnsupportedModelError
from tokenprune.methods.base import Method
from tokenprune.session import Session
from tokenprune.signals import Stage
from tokenprune.upstream.attention import checkpoints
from tokenprune.upstream.caches import new_cache
from tokenprune.upstream.facts import DecoderFacts
from tokenprune.upstream.families import n_planes
from tokenprune.upstream.quantized_cache import use_planes

Cuts = dict[int, tuple[tuple[Method, Stage], ...]]


def check_checkpointing(*modules: nn.Module) -> None:
    """Check that the layers of a decoder whose attention is pruned run once.

    Raises:
        UnsupportedModelError: one of `modules` has gradient checkpointing on.
    """
    if any(map(checkpoints, modules)):
        raise UnsupportedModelError(
            "heads, values or bits cannot be left out with gradient checkpointing, which would run layers a second "
            "time without their place in the forward; turn it off with model.gradient_checkpointing_disable()"
        )


def check_planes(facts: DecoderFacts) -> None:
    """Check that the cache that ``generate`` makes for a decoder can keep tokens in two planes of four bits.

    Raises:
        OptionError: it cannot.
    """
    try:
        use_planes(new_cache(facts.config))
    except UnsupportedModelError as error:
        raise OptionError(
            f"quantize was asked for, and of the cache that generate makes for {facts.called} {error}; give "
            "quantize=None"
        ) from error


def check_entrance(session: Session, facts: DecoderFacts) -> None:
    """Check that what is asked for at a decoder's entrance can be had.

    Raises:
        OptionError: it cannot.
    """
    before = session.methods_at("before_llm")
    biased = [method.name for method in before if method.biased]
    if biased and not (facts.fused or facts.eager):
        raise OptionError(
            f"method {biased[0]!r} was asked for size_bias=True, which adds to the logits of sdpa or eager attention, "
            f'and the model runs {facts.implementation!r}; load it with attn_implementation="sdpa" or leave '
            "size_bias=False"
        )
    if session.positions == "packed" and not before and (inside := session.methods_at("llm_layer")):
        raise OptionError(
            f'positions="packed" renumbers what is left before the decoder, and method {inside[0].name!r} drops tokens '
            'inside it, where positions are part of the keys already; use positions="original"'
        )


def check_decoder(root: nn.Module, facts: DecoderFacts, cuts: Cuts) -> None:
    """Check that tokens can be dropped in the decoder of `root` before the layers of `cuts`.

    Raises:
        OptionError: they cannot.
    """
    check_attention(facts)
    planes = n_planes(root)
    if cuts and min(cuts) < planes:
        raise OptionError(
            f"method {cuts[min(cuts)][0][0].name!r} wants to prune after layer {min(cuts) - 1}, but the vision encoder "
            f"adds features to the visual tokens of layers 0 to {planes - 1} (DeepStack); prune after layer "
            f"{planes - 1} or later"
        )


def check_attention(facts: DecoderFacts) -> None:
    """Check that tokens can be dropped between layers with the attention implementation of a decoder.

    Raises:
        OptionError: they cannot.
    """
    if not (facts.fused or facts.eager or facts.flash):
        raise OptionError(
            f"tokens can be dropped between decoder layers with the attention implementations sdpa, eager and flash "
            f"attention, and the model runs {facts.implementation!r}; load it with another attn_implementation or use "
            "a method that prunes before the decoder"
        )
