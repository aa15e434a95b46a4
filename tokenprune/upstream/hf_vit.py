"""Vision encoders of transformers: the rows, and the encoders that are refused, with the reason."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.upstream.check import look_up
from tokenprune.upstream.tower import CONVOLUTIONS, RELATIVE, STAGES, WINDOWS, Attending, Keys, Logits, Tower, child

_PARTS = {
    "query": ("q_proj", "attention.query"),
    "key": ("k_proj", "attention.key"),
    "value": ("v_proj", "attention.value"),
    "output": ("o_proj", "out_proj", "output.dense"),
}
"""Projections of an attention: as most have them and, last, as DINOv2 of older transformers does."""
_TOKENS = {
    "class": ("embeddings.cls_token", "embeddings.class_embedding"),
    "distillation": ("embeddings.distillation_token",),
    "registers": ("embeddings.register_tokens",),
}
"""Parameters `[..., D]` of a host: the tokens before the patches."""


def _n_heads(attention: Any) -> int:
    names = ("config.num_attention_heads", "num_attention_heads", "num_heads", "attention.num_attention_heads")
    return int(look_up(attention, *names, role="number of heads"))


def _name(attention: nn.Module, part: str) -> str | None:
    return next((name for name in _PARTS[part] if child(attention, name) is not None), None)


def _logits(block: nn.Module) -> Logits | None:
    attention = child(block, "attention") or child(block, "self_attn")
    if attention is None or _name(attention, "key") is None:
        return None
    query = look_up(attention, *_PARTS["query"], role="projection of the queries")
    key = look_up(attention, *_PARTS["key"], role="projection of the keys")
    scale = look_up(attention, "scaling", "scale", "attention.scaling", role="factor of the attention logits")
    read = partial(_split, _n_heads(attention))
    return Logits(Keys(query, "post", read), Keys(key, "post", read), float(scale), _rotate)


def _attending(attention: nn.Module) -> Attending | str:
    outward = _name(attention, "output")
    if outward is None:
        return "it has no attention with an output projection of its own"
    inward = tuple(_name(attention, part) or _PARTS[part][0] for part in ("query", "key", "value"))
    _dropout(attention)
    if outward == "output.dense":
        return Attending(inward, outward, _n_heads(attention), last=("output.dropout",), dropout=_dropout)
    return Attending(
        inward,
        outward,
        _n_heads(attention),
        dropout=_dropout,
        paired=True,
        plain=lambda attention: _implementation(attention) == "eager",
    )


def _dropout(attention: Any) -> float:
    names = ("attention_dropout", "dropout", "attention.dropout_prob")
    return float(look_up(attention, *names, role="rate of attention dropout") or 0)


def _implementation(host: Any) -> str:
    return str(look_up(host, "config._attn_implementation", role="attention implementation") or "sdpa")


def _split(n_heads: int, x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], n_heads, -1).transpose(1, 2)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the patches, which come last, as complex numbers whose parts are the halves of a head."""
    cos, sin = rope
    prefix, patches = x[:, :, : x.shape[2] - cos.shape[-2]], x[:, :, x.shape[2] - cos.shape[-2] :]
    real, imaginary = patches.chunk(2, -1)
    return torch.cat([prefix, patches * cos + torch.cat([-imaginary, real], -1) * sin], 2)


def _patches(host: Any) -> int:
    size = look_up(host, "config.image_size", role="size of images")
    patch = look_up(host, "config.patch_size", role="size of patches")
    sides = [(side, side) if isinstance(side, int) else tuple(side) for side in (size, patch)]
    return math.prod(whole // part for whole, part in zip(*sides, strict=True))


def _prefix(*kinds: str) -> Callable[[Any], int]:
    """Counts the tokens before the patches, which are of some kinds of :data:`_TOKENS`."""

    def count(host: Any) -> int:
        found = [look_up(host, *_TOKENS[kind], role="tokens before the patches") for kind in kinds]
        return sum(tokens.numel() // tokens.shape[-1] for tokens in found)

    return count


def _sample_rope(host: Any, x: Tensor) -> Any:
    heads = look_up(host, "config.num_attention_heads", role="number of heads")
    width = int(look_up(host, "config.hidden_size", role="width")) // int(heads)
    table = torch.linspace(-1, 1, len(x) * width, dtype=x.dtype, device=x.device).view(len(x), -1)
    return table.cos(), table.sin()


_tower = partial(
    Tower,
    library="transformers",
    mask="attention_mask",
    logits=_logits,
    attending=_attending,
    size="config.hidden_size",
    flag="gradient_checkpointing",
    turn_off="gradient_checkpointing_disable()",
    patches=_patches,
    implementation=_implementation,
)
_VIT = ("layernorm_before", "attention", "layernorm_after", "mlp")
_CLIP = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
_DINO = ("norm1", "attention", "norm2", "mlp")


TOWERS: tuple[Tower, ...] = (
    _tower("vit", ("ViTModel",), ("layers",), _VIT, _prefix("class")),
    _tower("deit", ("DeiTModel",), ("layers",), _VIT, _prefix("class", "distillation")),
    _tower("clip_vision_model", ("CLIPVisionModel",), ("encoder.layers",), _CLIP, _prefix("class")),
    _tower("siglip_vision_model", ("SiglipVisionModel",), ("encoder.layers",), _CLIP, _prefix()),
    _tower(
        "siglip2_vision_model",
        ("Siglip2VisionModel",),
        ("encoder.layers",),
        _CLIP,
        _prefix(),
        patches=lambda host: int(look_up(host, "config.num_patches", role="number of patches")),
    ),
    _tower("dinov2", ("Dinov2Model", "Dinov2Backbone"), ("encoder.layer",), _DINO, _prefix("class")),
    _tower(
        "dinov2_with_registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        ("encoder.layer",),
        _DINO,
        _prefix("class", "registers"),
    ),
    _tower(
        "dinov3_vit",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        ("model.layer", "layer"),
        _DINO,
        _prefix("class", "registers"),
        rope="position_embeddings",
        sample_rope=_sample_rope,
    ),
)

REFUSED: dict[str, str] = {
    "SwinPreTrainedModel": WINDOWS,
    "Swinv2PreTrainedModel": WINDOWS,
    "Swin2SRPreTrainedModel": WINDOWS,
    "MaskFormerSwinPreTrainedModel": WINDOWS,
    "DonutSwinPreTrainedModel": WINDOWS,
    "VitDetPreTrainedModel": WINDOWS,
    "SamVisionEncoder": WINDOWS,
    "HieraPreTrainedModel": STAGES,
    "PvtPreTrainedModel": STAGES,
    "PvtV2PreTrainedModel": STAGES,
    "SegformerPreTrainedModel": STAGES,
    "MobileViTPreTrainedModel": STAGES,
    "ConvNextPreTrainedModel": CONVOLUTIONS,
    "ConvNextV2PreTrainedModel": CONVOLUTIONS,
    "DINOv3ConvNextPreTrainedModel": CONVOLUTIONS,
    "BeitPreTrainedModel": RELATIVE,
    "Data2VecVisionPreTrainedModel": RELATIVE,
}
"""Why encoders that descend from a class of that name are refused."""
