"""Arithmetic of a decoder's prefill by formula, to hold against what the library counts, and for benchmarks that ask
what the decoder's layers alone would cost at given lengths.

A layer over `L` tokens of `B` rows multiplies each token by every weight matrix of the layer and each query by each
key and value: `2 B L (sum of in x out over its linear maps) + 4 B L^2 H K` with `H` heads of width `K`. Norms,
activations and rotary embedding are left out: they are well below a percent at any real width.
"""

from collections.abc import Sequence

from torch import nn


def decoder_flops_g(decoder: nn.Module, *, rows: int, lengths: Sequence[int]) -> float | None:
    """Billions of floating-point operations of a prefill in one piece.

    Args:
        decoder: a text decoder of transformers with `layers`, each of linear maps, norms and softmax attention.
        rows: rows of the batch, `B`.
        lengths: tokens that enter each layer, padding included: all the same without pruning inside the decoder.

    Returns:
        None where the decoder is of another build (experts, convolutions, recurrent layers): better no figure than a
        wrong one.
    """
    layers = list(getattr(decoder, "layers", ()))
    if len(layers) != len(lengths) or not lengths or min(lengths) < 1:
        return None
    total = 0
    for layer, length in zip(layers, lengths, strict=True):
        weights, width = _linear_weights(layer), _attention_width(layer)
        if weights is None or width is None:
            return None
        total += 2 * rows * length * weights + 4 * rows * length * length * width
    return total / 1e9


def _linear_weights(layer: nn.Module) -> int | None:
    """Elements of all weight matrices that every token meets; None if other modules than linear maps and norms have
    parameters."""
    total = 0
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            total += module.in_features * module.out_features
        elif next(module.parameters(recurse=False), None) is not None and "Norm" not in type(module).__name__:
            return None
    return total


def _attention_width(layer: nn.Module) -> int | None:
    """Width of all heads of the layer's attention together, `H K`; None where it cannot be told."""
    for module in layer.modules():
        config = getattr(module, "config", None)
        width = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
        heads = getattr(config, "num_attention_heads", None)
        if isinstance(width, int) and isinstance(heads, int):
            return width * heads
    return None
