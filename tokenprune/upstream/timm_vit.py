"""Vision encoders of timm: the rows, and the encoders that are refused, with the reason."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.upstream import check
from tokenprune.upstream.tower import CONVOLUTIONS, RELATIVE, STAGES, WINDOWS, Attending, Keys, Logits, Tower, child

_found = partial(check.look_up, library="timm")
_ROLES = {
    "num_heads": "number of heads",
    "scale": "factor of the attention logits",
    "qkv": "projection of queries, keys and values",
}


def _role(attention: Any, name: str) -> Any:
    return _found(attention, name, role=_ROLES[name])


def _logits(block: Any) -> Logits | None:
    """Queries and keys behind their norms, which are called also where they do nothing, rotated as timm does."""
    if child(block, "attn.q_norm") is not None and child(block, "attn.k_norm") is not None:  # [B, H, N, K]
        attention = block.attn
        query, key = (Keys(norm, "post", lambda x: x) for norm in (attention.q_norm, attention.k_norm))
        return Logits(query, key, float(_role(attention, "scale")), partial(_rotate, attention))
    if child(block, "q_norm") is not None and child(block, "sub_norm") is None:  # parallel: [B, N, H, K]
        query, key = (Keys(norm, "post", lambda x: x.transpose(1, 2)) for norm in (block.q_norm, block.k_norm))
        return Logits(query, key, float(_role(block, "scale")))
    return None


def _rotate(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    rotate = check.need("timm.layers", "apply_rot_embed_cat", role="rotation of queries and keys")
    n_prefix = _prefix(attention)
    rotated = rotate(x[:, :, n_prefix:], rope, half=getattr(attention, "rotate_half", False))
    return torch.cat([x[:, :, :n_prefix], rotated], 2)


def _beit_logits(block: Any) -> Logits | None:
    """Queries and keys from the attention's input: BEiT multiplies with the weights of its projection, not through the
    module. Its keys have no bias."""
    attention: Any = child(block, "attn")
    if attention is None:
        return None

    def split(x: Tensor, part: int, bias: Tensor | None) -> Tensor:
        projected = nn.functional.linear(x, _role(attention, "qkv").weight.chunk(3)[part], bias)
        return projected.view(*x.shape[:2], _role(attention, "num_heads"), -1).transpose(1, 2)

    def query(x: Tensor) -> Tensor:
        return split(x, 0, _found(attention, "q_bias", role="bias of the queries"))

    def mean_key(x: Tensor) -> Tensor:
        heads = _role(attention, "qkv").weight.chunk(3)[1].unflatten(0, (_role(attention, "num_heads"), -1))
        return nn.functional.linear(x, heads.mean(0)).float()

    key = Keys(attention, "pre", lambda x: split(x, 1, None), mean_key)
    return Logits(Keys(attention, "pre", query), key, float(_role(attention, "scale")))


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


def _relative(host: Any) -> str:
    role = "table of relative positions"
    attentions = [_found(block, "attn", role="attention") for block in _found(host, "blocks", role="list of blocks")]
    tables = [_found(attention, "relative_position_bias_table", role=role) for attention in attentions]
    return "" if all(table is None for table in (_found(host, "rel_pos_bias", role=role), *tables)) else RELATIVE


_tower = partial(
    Tower,
    paths=("blocks",),
    parts=("norm1", "attn", "norm2", "mlp"),
    prefix=_prefix,
    library="timm",
    mask="attn_mask",
    logits=_logits,
    attending=_attending,
    size="embed_dim",
    flag="grad_checkpointing",
    turn_off="set_grad_checkpointing(False)",
    patches=_patches,
    pooled=_pooled,
)

TOWERS: tuple[Tower, ...] = (
    _tower("timm_vit", ("VisionTransformer",)),
    _tower("timm_eva", ("Eva",), rope="rope", sample_rope=_sample_rope),
    _tower("timm_beit", ("Beit",), mask="shared_rel_pos_bias", logits=_beit_logits, obstacle=_relative),
)

REFUSED: dict[str, str] = {
    "SwinTransformer": WINDOWS,
    "SwinTransformerV2": WINDOWS,
    "SwinTransformerV2Cr": WINDOWS,
    "MaxxVit": WINDOWS,
    "GlobalContextVit": WINDOWS,
    "VisionTransformerSAM": WINDOWS,
    "Twins": WINDOWS,
    "DaVit": WINDOWS,
    "Hiera": STAGES,
    "HieraDet": STAGES,
    "MultiScaleVit": STAGES,
    "PyramidVisionTransformerV2": STAGES,
    "PoolingVisionTransformer": STAGES,
    "Levit": STAGES,
    "Nest": STAGES,
    "ConvNeXt": CONVOLUTIONS,
    "VisionTransformerRelPos": RELATIVE,
    "NaFlexVit": "its images are packed with padding to sequences of different grids (NaFlex)",
}
"""Why encoders of a class of that name are refused."""
