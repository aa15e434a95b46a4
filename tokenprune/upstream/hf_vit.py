"""Vision encoders of transformers: the rows, and the encoders that are refused, with the reason."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.upstream.check import missing
from tokenprune.upstream.tower import Attending, Keys, Logits, Tower, child, heads_averaged, look_up, seen_in

_KEYS = ("attention.k_proj", "self_attn.k_proj", "attention.attention.key")
_QUERIES = {"k_proj": "q_proj", "key": "query"}


def _attention(block: nn.Module) -> tuple[Any, str] | None:
    """The module of a block that has its key projection, and what that is called there."""
    path = next((path for path in _KEYS if child(block, path) is not None), None)
    if path is None:
        return None
    place, _, name = path.rpartition(".")
    return child(block, place), name


def _keys(block: nn.Module) -> Keys | None:
    if (found := _attention(block)) is None:
        return None
    attention, name = found
    return Keys(attention.get_submodule(name), "post", heads_averaged(_n_heads(attention)))


def _n_heads(attention: Any) -> int:
    config = getattr(attention, "config", None)
    places = ((config, "num_attention_heads"), (attention, "num_attention_heads"), (attention, "num_heads"))
    for thing, name in places:
        if isinstance(number := getattr(thing, name, None), int):
            return number
    wanted = dict.fromkeys(name for _, name in places)
    raise missing("number of heads", of=type(attention).__name__, wanted=wanted, seen=seen_in(attention))


def _logits(block: nn.Module) -> Logits | None:
    if (found := _attention(block)) is None:
        return None
    attention, name = found
    query = look_up(attention, _QUERIES[name], role="projection of the queries")
    scale = look_up(attention, "scaling", "scale", role="factor of the attention logits")
    read = partial(_split, _n_heads(attention))
    return Logits(Keys(query, "post", read), Keys(attention.get_submodule(name), "post", read), float(scale), _rotate)


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
    names = ("q_proj", "k_proj", "v_proj")
    _dropout(attention)
    return Attending(names, outward, _n_heads(attention), dropout=_dropout, paired=True, plain=_is_eager)


def _dropout(attention: Any) -> float:
    return float(look_up(attention, "attention_dropout", "dropout", role="rate of attention dropout") or 0)


def _implementation(host: Any) -> str:
    config = look_up(host, "config", role="config")
    return str(look_up(config, "_attn_implementation", role="attention implementation") or "sdpa")


def _is_eager(attention: Any) -> bool:
    return _implementation(attention) == "eager"


def _split(n_heads: int, x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], n_heads, -1).transpose(1, 2)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the patches, which come last, as complex numbers whose parts are the halves of a head."""
    cos, sin = rope
    prefix, patches = x[:, :, : x.shape[2] - cos.shape[-2]], x[:, :, x.shape[2] - cos.shape[-2] :]
    real, imaginary = patches.chunk(2, -1)
    return torch.cat([prefix, patches * cos + torch.cat([-imaginary, real], -1) * sin], 2)


def _field(host: Any, name: str, role: str) -> Any:
    return look_up(look_up(host, "config", role="config"), name, role=role)


def _width(host: Any) -> int:
    return int(_field(host, "hidden_size", "width"))


def _patches(host: Any) -> int:
    size, patch = _field(host, "image_size", "size of images"), _field(host, "patch_size", "size of patches")
    sides = [(side, side) if isinstance(side, int) else tuple(side) for side in (size, patch)]
    return math.prod(whole // part for whole, part in zip(*sides, strict=True))


_CLASS, _DISTILLATION, _REGISTERS = ("cls_token", "class_embedding"), ("distillation_token",), ("register_tokens",)


def _prefix(*kinds: tuple[str, ...]) -> Callable[[Any], int]:
    """Counts the tokens before the patches: those of each kind are a parameter `[..., D]` of the embeddings."""

    def count(host: Any) -> int:
        if not kinds:
            return 0
        embeddings = look_up(host, "embeddings", role="embeddings of patches")
        found = (look_up(embeddings, *names, role="tokens before the patches") for names in kinds)
        return sum(tokens.numel() // tokens.shape[-1] for tokens in found)

    return count


def _sample_rope(host: Any, x: Tensor) -> Any:
    width = _width(host) // int(_field(host, "num_attention_heads", "number of heads"))
    table = torch.linspace(-1, 1, len(x) * width, dtype=x.dtype, device=x.device).view(len(x), -1)
    return table.cos(), table.sin()


def _refuse(host: Any) -> str:
    flags = [module.gradient_checkpointing for module in host.modules() if hasattr(module, "gradient_checkpointing")]
    if not flags:
        seen = sorted({name for module in host.modules() for name in seen_in(module) if "checkpoint" in name})
        wanted = ["gradient_checkpointing"]
        raise missing("flag of gradient checkpointing", of=type(host).__name__, wanted=wanted, seen=seen)
    if any(flags):
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
    prefix: Callable[[Any], int],
    **further: Any,
) -> Tower:
    return Tower(
        name, "transformers", hosts, path, parts, "attention_mask", _keys, _logits, _attending, _width,
        prefix,
        **{"patches": _patches, "refusal": _refuse, "implementation": _implementation, **further},
    )  # fmt: skip


_VIT = ("layernorm_before", "attention", "layernorm_after", "mlp")
_CLIP = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
_DINO = ("norm1", "attention", "norm2", "mlp")

TOWERS: tuple[Tower, ...] = (
    _tower("vit", ("ViTModel",), ("layers",), _VIT, _prefix(_CLASS)),
    _tower("deit", ("DeiTModel",), ("layers",), _VIT, _prefix(_CLASS, _DISTILLATION)),
    _tower("clip_vision_model", ("CLIPVisionModel",), ("encoder.layers",), _CLIP, _prefix(_CLASS)),
    _tower("siglip_vision_model", ("SiglipVisionModel",), ("encoder.layers",), _CLIP, _prefix()),
    _tower(
        "siglip2_vision_model",
        ("Siglip2VisionModel",),
        ("encoder.layers",),
        _CLIP,
        _prefix(),
        patches=lambda host: int(_field(host, "num_patches", "number of patches")),
    ),
    _tower("dinov2", ("Dinov2Model", "Dinov2Backbone"), ("encoder.layer",), _DINO, _prefix(_CLASS)),
    _tower(
        "dinov2_with_registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        ("encoder.layer",),
        _DINO,
        _prefix(_CLASS, _REGISTERS),
    ),
    _tower(
        "dinov3_vit",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        ("model.layer", "layer"),
        _DINO,
        _prefix(_CLASS, _REGISTERS),
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
