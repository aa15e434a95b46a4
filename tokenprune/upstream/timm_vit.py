"""Vision encoders of timm: the rows, and the encoders that are refused, with the reason."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.upstream.check import need
from tokenprune.upstream.tower import Attending, Keys, Logits, Tower, averaged, child, look_up

_found = partial(look_up, library="timm")
_ROLES = {
    "num_heads": "number of heads",
    "scale": "factor of the attention logits",
    "qkv": "projection of queries, keys and values",
}


def _keys(block: Any) -> Keys | None:
    """Keys behind their norm, which is called also where it does nothing; before any rotation."""
    if (norm := child(block, "attn.k_norm")) is not None:  # [B, H, N, K]
        return Keys(norm, "post", lambda keys: averaged(keys, 1))
    if (norm := child(block, "k_norm")) is not None and child(block, "sub_norm") is None:  # parallel: [B, N, H, K]
        return Keys(norm, "post", lambda keys: averaged(keys, 2))
    return None


def _role(attention: Any, name: str) -> Any:
    return _found(attention, name, role=_ROLES[name])


def _beit_keys(block: Any) -> Keys | None:
    """Keys from the attention's input: BEiT multiplies with the weights of its projection, not through the module."""
    attention: Any = child(block, "attn")
    if attention is None:
        return None

    def read(x: Tensor) -> Tensor:
        weight = _role(attention, "qkv").weight
        weight = weight.view(3, _role(attention, "num_heads"), -1, weight.shape[1])[1].mean(0)  # its keys have no bias
        return nn.functional.linear(x, weight).float()

    return Keys(attention, "pre", read)


def _logits(block: Any) -> Logits | None:
    """Queries and keys behind their norms, rotated as timm does."""
    if child(block, "attn.q_norm") is not None and child(block, "attn.k_norm") is not None:  # [B, H, N, K]
        attention = block.attn
        query, key = (Keys(norm, "post", lambda x: x) for norm in (attention.q_norm, attention.k_norm))
        return Logits(query, key, float(_role(attention, "scale")), partial(_rotate, attention))
    if child(block, "q_norm") is not None and child(block, "sub_norm") is None:  # parallel: [B, N, H, K]
        query, key = (Keys(norm, "post", lambda x: x.transpose(1, 2)) for norm in (block.q_norm, block.k_norm))
        return Logits(query, key, float(_role(block, "scale")))
    return None


def _rotate(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    rotate = need("timm.layers", "apply_rot_embed_cat", role="rotation of queries and keys")
    n_prefix = _prefix(attention)
    rotated = rotate(x[:, :, n_prefix:], rope, half=getattr(attention, "rotate_half", False))
    return torch.cat([x[:, :, :n_prefix], rotated], 2)


def _beit_logits(block: Any) -> Logits:
    attention = block.attn

    def part(number: int) -> Keys:
        def read(x: Tensor) -> Tensor:
            bias = None if number else _found(attention, "q_bias", role="bias of the queries")  # its keys have none
            projected = nn.functional.linear(x, _role(attention, "qkv").weight.chunk(3)[number], bias)
            return projected.view(*x.shape[:2], _role(attention, "num_heads"), -1).transpose(1, 2)

        return Keys(attention, "pre", read)

    return Logits(part(0), part(1), float(_role(attention, "scale")))


def _attending(attention: Any) -> Attending | str:
    """A fused projection or three, with or without biases of their own, which is what timm's attentions have."""
    if any(getattr(attention, name, None) is None for name in ("proj", "num_heads")):
        return "it has no attention with an output projection of its own"
    for name in ("norm", "gate"):
        if not isinstance(getattr(attention, name, None), nn.Identity | None):
            return f"its attention has a {name} of all heads before its output projection"
    fused = getattr(attention, "qkv", None) is not None
    names = ("q_bias", "k_bias", "v_bias")
    _dropout(attention)
    return Attending(
        ("qkv",) if fused else ("q_proj", "k_proj", "v_proj"),
        "proj",
        int(attention.num_heads),
        biases=names if fused and getattr(attention, "q_bias", None) is not None else (),
        norms=("q_norm", "k_norm") if child(attention, "k_norm") is not None else (),
        last=("proj_drop",),
        dropout=_dropout,
    )


def _dropout(attention: Any) -> float:
    return float(_found(attention, "attn_drop", role="dropout of the attention").p)


def _patches(host: Any) -> int:
    if getattr(host, "dynamic_img_size", False):
        return 0
    embed = _found(host, "patch_embed", role="embeddings of patches")
    return int(getattr(embed, "num_patches", 0) or 0)


def _width(host: Any) -> int:
    return int(_found(host, "embed_dim", role="width"))


def _prefix(host: Any) -> int:
    return int(_found(host, "num_prefix_tokens", role="number of tokens before the patches"))


def _pooled(host: Any) -> bool:
    return getattr(host, "global_pool", None) == "token" and getattr(host, "attn_pool", None) is None


def _sample_rope(host: Any, x: Tensor) -> Tensor | None:
    if _found(host, "rope", role="rotary embeddings") is None:
        return None
    attention = _found(host.blocks[0], "attn", role="attention")
    width = 2 * _found(attention, "proj", role="output projection").in_features // _role(attention, "num_heads")
    return torch.linspace(-1, 1, len(x) * width, dtype=x.dtype, device=x.device).view(len(x), -1)


def _refuse_checkpointing(host: Any) -> str:
    if _found(host, "grad_checkpointing", role="flag of gradient checkpointing"):
        return "gradient checkpointing would run its blocks a second time without their place in the forward; turn " \
            "it off with model.set_grad_checkpointing(False)"  # fmt: skip
    return ""


def _refuse_beit(host: Any) -> str:
    role = "table of relative positions"
    attentions = [_found(block, "attn", role="attention") for block in _found(host, "blocks", role="list of blocks")]
    tables = [_found(attention, "relative_position_bias_table", role=role) for attention in attentions]
    if any(table is not None for table in (_found(host, "rel_pos_bias", role=role), *tables)):
        return (
            "its attention adds a table of relative positions of the whole grid, which cannot follow tokens that are "
            "merged"
        )
    return _refuse_checkpointing(host)


_PARTS = ("norm1", "attn", "norm2", "mlp")

TOWERS: tuple[Tower, ...] = (
    Tower(
        "timm_vit",
        "timm",
        ("VisionTransformer",),
        ("blocks",),
        _PARTS,
        "attn_mask",
        _keys,
        _logits,
        _attending,
        _width,
        _prefix,
        _patches,
        pooled=_pooled,
        refusal=_refuse_checkpointing,
    ),
    Tower(
        "timm_eva",
        "timm",
        ("Eva",),
        ("blocks",),
        _PARTS,
        "attn_mask",
        _keys,
        _logits,
        _attending,
        _width,
        _prefix,
        _patches,
        rope="rope",
        sample_rope=_sample_rope,
        pooled=_pooled,
        refusal=_refuse_checkpointing,
    ),
    Tower(
        "timm_beit",
        "timm",
        ("Beit",),
        ("blocks",),
        _PARTS,
        "shared_rel_pos_bias",
        _beit_keys,
        _beit_logits,
        _attending,
        _width,
        _prefix,
        _patches,
        pooled=_pooled,
        refusal=_refuse_beit,
    ),
)

_WINDOWS = "its attention looks at windows of the grid, which merged tokens no longer make"
_STAGES = "its stages pool the grid, which merged tokens no longer make"
_RELATIVE = "its attention adds a table of relative positions of the whole grid, which cannot follow tokens merged"

REFUSED: dict[str, str] = {
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "SwinTransformerV2Cr": _WINDOWS,
    "MaxxVit": _WINDOWS,
    "GlobalContextVit": _WINDOWS,
    "VisionTransformerSAM": _WINDOWS,
    "Twins": _WINDOWS,
    "DaVit": _WINDOWS,
    "Hiera": _STAGES,
    "HieraDet": _STAGES,
    "MultiScaleVit": _STAGES,
    "PyramidVisionTransformerV2": _STAGES,
    "PoolingVisionTransformer": _STAGES,
    "Levit": _STAGES,
    "Nest": _STAGES,
    "ConvNeXt": "it is a convolutional network: it has a grid in stages and no tokens",
    "VisionTransformerRelPos": _RELATIVE,
    "NaFlexVit": "its images are packed with padding to sequences of different grids (NaFlex)",
}
