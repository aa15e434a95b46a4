"""Vision encoders of transformers: the rows, and the encoders that are refused, with the reason."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.models.tower import Attending, Keys, Logits, Tower, child, heads_averaged

_KEYS = ("attention.k_proj", "self_attn.k_proj", "attention.attention.key")


def _keys(block: nn.Module) -> Keys | None:
    for path in _KEYS:
        if (projection := child(block, path)) is not None:
            return Keys(projection, "post", heads_averaged(_n_heads(child(block, path.rpartition(".")[0]))))
    return None


def _n_heads(attention: Any) -> int:
    config = getattr(attention, "config", None)
    return int(getattr(config, "num_attention_heads", None) or attention.num_attention_heads)


def _logits(block: nn.Module) -> Logits | None:
    for path in _KEYS:
        place, _, name = path.rpartition(".")
        attention: Any = child(block, place)
        key, query = child(block, path), child(attention, {"k_proj": "q_proj"}.get(name, "query"))
        scale = getattr(attention, "scaling", None) or getattr(attention, "scale", None)
        if key is None or query is None or scale is None:
            continue
        read = partial(_split, _n_heads(attention))
        return Logits(Keys(query, "post", read), Keys(key, "post", read), float(scale), _rotate)
    return None


def _attending(attention: Any) -> Attending | str:
    if child(attention, "attention.query") is not None and child(attention, "output.dense") is not None:
        return Attending(  # DINOv2 of older transformers
            ("attention.query", "attention.key", "attention.value"),
            "output.dense",
            _n_heads(attention.attention),
            last=("output.dropout",),
            dropout=lambda attention: float(attention.attention.dropout_prob),
        )
    outward = next((name for name in ("o_proj", "out_proj") if child(attention, name) is not None), None)
    if outward is None:
        return "it has no attention with an output projection of its own"

    def dropout(attention: Any) -> float:
        return float(getattr(attention, "attention_dropout", None) or getattr(attention, "dropout", None) or 0)

    names = ("q_proj", "k_proj", "v_proj")
    return Attending(names, outward, _n_heads(attention), dropout=dropout, paired=True)


def _split(n_heads: int, x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], n_heads, -1).transpose(1, 2)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the patches, which come last, as complex numbers whose parts are the halves of a head."""
    cos, sin = rope
    prefix, patches = x[:, :, : x.shape[2] - cos.shape[-2]], x[:, :, x.shape[2] - cos.shape[-2] :]
    real, imaginary = patches.chunk(2, -1)
    return torch.cat([prefix, patches * cos + torch.cat([-imaginary, real], -1) * sin], 2)


def _width(host: Any) -> int:
    return int(host.config.hidden_size)


def _patches(host: Any) -> int:
    size, patch = host.config.image_size, host.config.patch_size
    sides = [(side, side) if isinstance(side, int) else tuple(side) for side in (size, patch)]
    return math.prod(whole // part for whole, part in zip(*sides, strict=True))


def _registers(host: Any) -> int:
    return 1 + int(host.config.num_register_tokens)


def _sample_rope(host: Any, x: Tensor) -> Any:
    width = host.config.hidden_size // host.config.num_attention_heads
    table = torch.linspace(-1, 1, len(x) * width, dtype=x.dtype, device=x.device).view(len(x), -1)
    return table.cos(), table.sin()


def _refuse(host: Any) -> str:
    if any(getattr(module, "gradient_checkpointing", False) for module in host.modules()):
        return (
            "gradient checkpointing would run its blocks a second time without their place in the forward; turn it off "
            "with model.gradient_checkpointing_disable()"
        )
    return ""


def _tower(
    name: str,
    hosts: tuple[str, ...],
    path: tuple[str, ...],
    parts: tuple[str, str, str, str],
    prefix: int | Any,
    **further: Any,
) -> Tower:
    count = prefix if callable(prefix) else lambda host: prefix
    return Tower(
        name, "transformers", hosts, path, parts, "attention_mask", _keys, _logits, _attending, _width,
        count,
        **{"patches": _patches, "refusal": _refuse, **further},
    )  # fmt: skip


_VIT = ("layernorm_before", "attention", "layernorm_after", "mlp")
_CLIP = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
_DINO = ("norm1", "attention", "norm2", "mlp")

TOWERS: tuple[Tower, ...] = (
    _tower("vit", ("ViTModel",), ("layers",), _VIT, 1),
    _tower("deit", ("DeiTModel",), ("layers",), _VIT, 2),
    _tower("clip_vision_model", ("CLIPVisionModel",), ("encoder.layers",), _CLIP, 1),
    _tower("siglip_vision_model", ("SiglipVisionModel",), ("encoder.layers",), _CLIP, 0),
    _tower(
        "siglip2_vision_model",
        ("Siglip2VisionModel",),
        ("encoder.layers",),
        _CLIP,
        0,
        patches=lambda host: int(host.config.num_patches),
    ),
    _tower("dinov2", ("Dinov2Model", "Dinov2Backbone"), ("encoder.layer",), _DINO, 1),
    _tower(
        "dinov2_with_registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        ("encoder.layer",),
        _DINO,
        _registers,
    ),
    _tower(
        "dinov3_vit",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        ("model.layer", "layer"),
        _DINO,
        _registers,
        rope="position_embeddings",
        sample_rope=_sample_rope,
    ),
)

_WINDOWS = "its attention looks at windows of the grid, which merged tokens no longer make"
_STAGES = "its stages pool the grid, which merged tokens no longer make"
_CONVOLUTIONS = "it is a convolutional network: it has a grid in stages and no tokens"
_RELATIVE = "its attention adds a table of relative positions of the whole grid, which cannot follow tokens merged"

REFUSED: dict[str, str] = {
    "Swin": _WINDOWS,
    "Swinv2": _WINDOWS,
    "Swin2SR": _WINDOWS,
    "MaskFormerSwin": _WINDOWS,
    "DonutSwin": _WINDOWS,
    "VitDet": _WINDOWS,
    "SamVisionEncoder": _WINDOWS,
    "Hiera": _STAGES,
    "Pvt": _STAGES,
    "PvtV2": _STAGES,
    "Segformer": _STAGES,
    "MobileViT": _STAGES,
    "ConvNext": _CONVOLUTIONS,
    "ConvNextV2": _CONVOLUTIONS,
    "DINOv3ConvNext": _CONVOLUTIONS,
    "Beit": _RELATIVE,
    "Data2VecVision": _RELATIVE,
}
