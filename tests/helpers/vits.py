"""Tiny random vision encoders of every family, and ToMe written out plainly for each of them.

What :func:`merged` does is the paper (arXiv 2210.09461) row by row with loops and whole attention matrices, the tokens
in the order that the paper leaves them in; it shares nothing with the library but the weights.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
import transformers
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

DEPTH, WIDTH, HEADS, PATCH = 4, 24, 3, 8
PATCHES = {side * side: side for side in (2, 3, 4, 5)}  # tokens of an image and its side in patches


def _timm(cls: type[nn.Module], **options: Any) -> Callable[[int], nn.Module]:
    common = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
    return lambda n: cls(img_size=PATCHES[n] * PATCH, **{**common, **options})


def _hf(name: str, **options: Any) -> Callable[[int], nn.Module]:
    def build(n: int) -> nn.Module:
        cls = getattr(transformers, name)
        fields = {
            "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 40,
            "patch_size": PATCH, "image_size": PATCHES[n] * PATCH, "num_labels": 5,
        }  # fmt: skip
        fields |= {key: value(n) if callable(value) else value for key, value in options.items()}
        return cls._from_config(cls.config_class(**fields), attn_implementation="sdpa")

    return build


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "timm vit": _timm(VisionTransformer),
    "timm deit distilled": _timm(VisionTransformerDistilled),
    "timm deit3": _timm(VisionTransformer, no_embed_class=True, init_values=0.5),
    "timm registers": _timm(VisionTransformer, reg_tokens=4, no_embed_class=True, qk_norm=True, pre_norm=True),
    "timm siglip": _timm(VisionTransformer, class_token=False, global_pool="map"),
    "timm average": _timm(VisionTransformer, class_token=False, global_pool="avg", fc_norm=False),
    "timm dinov2": _timm(
        VisionTransformer, reg_tokens=2, init_values=0.5, mlp_layer=timm.layers.SwiGLUPacked, mlp_ratio=4
    ),
    "timm post norm": _timm(VisionTransformer, block_fn=ResPostBlock),
    "timm parallel": _timm(VisionTransformer, block_fn=ParallelScalingBlock),
    "timm eva": _timm(Eva, qkv_fused=True, init_values=0.5, use_rot_pos_emb=False),
    "timm eva02": _timm(Eva, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True),
    "timm rope": _timm(
        Eva, qkv_fused=True, use_rot_pos_emb=True, use_abs_pos_emb=False, rope_type="mixed", num_reg_tokens=2,
        attn_type="rope", rope_grid_offset=1.0,
    ),
    "timm dinov3": _timm(
        Eva, use_rot_pos_emb=True, use_abs_pos_emb=False, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=4,
        init_values=0.5, global_pool="token",
    ),
    "timm beit": _timm(Beit, init_values=0.5, use_abs_pos_emb=True),
    "hf vit": _hf("ViTForImageClassification"),
    "hf deit": _hf("DeiTForImageClassificationWithTeacher"),
    "hf clip": _hf("CLIPVisionModelWithProjection", projection_dim=6),
    "hf siglip": _hf("SiglipVisionModel"),
    "hf siglip2": _hf("Siglip2VisionModel", num_patches=lambda n: n),
    "hf dinov2": _hf("Dinov2ForImageClassification", mlp_ratio=2),
    "hf dinov2 registers": _hf("Dinov2WithRegistersForImageClassification", mlp_ratio=2, num_register_tokens=3),
    "hf dinov3": _hf("DINOv3ViTModel", num_register_tokens=3),
}  # fmt: skip
NAMES = tuple(BUILDERS)
PREFIX = {
    "timm deit distilled": 2, "timm registers": 5, "timm siglip": 0, "timm average": 0, "timm dinov2": 3,
    "timm rope": 3, "timm dinov3": 5, "hf deit": 2, "hf siglip": 0, "hf siglip2": 0, "hf dinov2 registers": 4,
    "hf dinov3": 4,
}  # fmt: skip
AT_END = ("timm post norm", "timm parallel")


@cache
def _model(name: str, n_patches: int) -> nn.Module:
    torch.manual_seed(0)
    model = BUILDERS[name](n_patches).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim >= 2 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def tiny(name: str, n_patches: int = 16) -> nn.Module:
    """A tiny random encoder, a fresh copy for each call."""
    return copy.deepcopy(_model(name, n_patches))


def inputs(name: str, n_patches: int = 16, *, n_rows: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the encoder's forward."""
    side = PATCHES[n_patches] * PATCH
    x = torch.randn(n_rows, 3, side, side, generator=torch.Generator().manual_seed(seed))
    if name == "hf siglip2":
        patches = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        shape = torch.tensor([[PATCHES[n_patches]] * 2] * n_rows)
        mask = torch.ones(n_rows, n_patches, dtype=torch.int64)
        return {"pixel_values": patches, "spatial_shapes": shape, "pixel_attention_mask": mask}
    return {"x" if name.startswith("timm") else "pixel_values": x}


def run(model: nn.Module, given: dict[str, Any], **kwargs: Any) -> Any:
    """The model's forward without gradients."""
    with torch.no_grad():
        return model(**given, **kwargs)


def answer(output: Any) -> Tensor:
    """What a model is called for: logits, or else the pooled or last hidden states."""
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if output.get(key) is not None:
            return output[key]
    raise AssertionError(output.keys())


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of an encoder."""
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList | nn.Sequential) and len(one) == DEPTH]
    return list(lists[0])


# --- the paper, written out -----------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """A block's branches as functions.

    Attributes:
        project: input of the attention `[N, D]` to queries, keys and values `[H, N, K]`, not yet rotated.
        out: heads `[N, D]` to what attention adds.
        norm1: norm of the attention branch; `norm2` of the other one.
        mlp: input of the MLP to what it adds.
        rotate: rotates queries or keys `[H, M, K]` of the patches at given places `[M]`.
    """

    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    out: Callable[[Tensor], Tensor]
    norm1: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None


def _heads(x: Tensor) -> Tensor:
    return x.view(len(x), HEADS, -1).transpose(0, 1)


def _scale(module: Any, *names: str) -> Any:
    found = [getattr(module, name) for name in names if getattr(module, name, None) is not None]
    return found[0] if found else 1.0


def plain_timm(block: Any, rope: Any = None, half: bool = False) -> Plain:
    """The branches of a timm block with norms in front."""
    attention = block.attn

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if getattr(attention, "qkv", None) is not None:
            bias = attention.qkv.bias
            if getattr(attention, "q_bias", None) is not None:
                bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
            q, k, v = map(_heads, nn.functional.linear(x, attention.qkv.weight, bias).chunk(3, dim=-1))
        else:
            q, k, v = (_heads(getattr(attention, f"{one}_proj")(x)) for one in "qkv")
        if hasattr(attention, "k_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q, k, v

    def out(x: Tensor) -> Tensor:
        x = attention.norm(x) if hasattr(attention, "norm") else x
        x = attention.proj(x) * _scale(block, "gamma_1")
        return x * _scale(getattr(block, "ls1", None), "gamma")

    def mlp(x: Tensor) -> Tensor:
        return block.mlp(x) * _scale(block, "gamma_2") * _scale(getattr(block, "ls2", None), "gamma")

    def rotate(x: Tensor, places: Tensor) -> Tensor:
        sin, cos = rope[..., places, :].chunk(2, -1)
        if half:
            other = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        else:
            other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * cos + other * sin

    return Plain(project, out, block.norm1, block.norm2, mlp, None if rope is None else rotate)


def plain_hf(block: Any, rope: Any = None) -> Plain:
    """The branches of a block of transformers."""
    attention = getattr(block, "attention", None) or block.self_attn
    names = [("layernorm_before", "layernorm_after"), ("layer_norm1", "layer_norm2"), ("norm1", "norm2")]
    first, second = next(pair for pair in names if hasattr(block, pair[0]))
    project_out = getattr(attention, "o_proj", None) or attention.out_proj

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _heads(attention.q_proj(x)), _heads(attention.k_proj(x)), _heads(attention.v_proj(x))

    def rotate(x: Tensor, places: Tensor) -> Tensor:
        cos, sin = (part[places] for part in rope)
        return x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin

    return Plain(
        project,
        lambda x: project_out(x) * _scale(getattr(block, "layer_scale1", None), "lambda1"),
        getattr(block, first),
        getattr(block, second),
        lambda x: block.mlp(x) * _scale(getattr(block, "layer_scale2", None), "lambda1"),
        None if rope is None else rotate,
    )


def plain_blocks(name: str, model: Any, given: dict[str, Any]) -> list[Plain]:
    """All blocks of a model as plain functions."""
    blocks = blocks_of(model)
    if name == "hf dinov3":
        return [plain_hf(block, model.rope_embeddings(given["pixel_values"])) for block in blocks]
    if name.startswith("hf"):
        return [plain_hf(block) for block in blocks]
    rope = getattr(model, "rope", None)
    if rope is None:
        return [plain_timm(block) for block in blocks]
    side = math.isqrt(model.patch_embed.num_patches)
    table = rope.get_embed(shape=(side, side))
    mixed = getattr(model, "rope_mixed", False)
    half = name == "timm dinov3"
    return [plain_timm(block, table[i] if mixed else table, half) for i, block in enumerate(blocks)]


def attend(block: Plain, x: Tensor, sizes: list[float], places: list[int], prefix: int) -> tuple[Tensor, Tensor]:
    """Attention of one row with sizes on its logits: what it adds, and keys averaged over heads `[N, K]`."""
    q, k, v = block.project(block.norm1(x))
    metric = k.mean(0)
    if block.rotate is not None:
        where = torch.tensor(places[prefix:]) - prefix
        q = torch.cat([q[:, :prefix], block.rotate(q[:, prefix:], where)], 1)
        k = torch.cat([k[:, :prefix], block.rotate(k[:, prefix:], where)], 1)
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + x.new_tensor(sizes).log()
    return block.out((logits.softmax(-1) @ v).transpose(0, 1).flatten(1)), metric


def merge(
    x: Tensor,
    metric: Tensor,
    sizes: list[float],
    places: list[int],
    groups: list[set[int]],
    r: int,
    prefix: int,
    order: str = "paper",
) -> tuple[Tensor, list[float], list[int], list[set[int]]]:
    """Merge the `r` most alike pairs of one row; each group stands at the place of its destination.

    In the paper's order the sources that are left come first and the destinations behind them, after the tokens before
    the patches.
    """
    unit = metric / metric.norm(dim=1, keepdim=True)
    sources = [i for i in range(prefix, len(x)) if i % 2 == 0]
    targets = [i for i in range(prefix, len(x)) if i % 2 == 1]
    pairs = []
    for i in sources if targets else []:
        likeness = [float(unit[i] @ unit[j]) for j in targets]
        best = max(range(len(targets)), key=lambda j: (likeness[j], -j))
        pairs.append((-likeness[best], i, targets[best]))
    rows, weights, held = [one.clone() for one in x], list(sizes), [set(one) for one in groups]
    gone = set()
    for _, i, j in sorted(pairs)[:r]:
        rows[j] = (rows[j] * weights[j] + x[i] * sizes[i]) / (weights[j] + sizes[i])
        weights[j] += sizes[i]
        held[j] |= held[i]
        gone.add(i)
    left = [i for i in range(len(x)) if i not in gone]
    if order == "paper" and gone:
        patches = left[prefix:]
        left = left[:prefix] + [i for i in patches if i in sources] + [i for i in patches if i in targets]
    return torch.stack([rows[i] for i in left]), [weights[i] for i in left], [places[i] for i in left], [
        held[i] for i in left
    ]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row after some blocks: tokens `[M, D]`, their sizes, places and the tokens that each represents."""

    x: Tensor
    sizes: list[float]
    places: list[int]
    groups: list[set[int]]

    def in_place(self) -> "Row":
        """The same tokens in the order of their places."""
        order = sorted(range(len(self.places)), key=self.places.__getitem__)
        sizes, places, groups = ([some[i] for i in order] for some in (self.sizes, self.places, self.groups))
        return Row(self.x[order], sizes, places, groups)

    def spread(self) -> Tensor:
        """All tokens `[N, D]`, each with the value of its group."""
        out = self.x.new_empty(sum(map(len, self.groups)), self.x.shape[1])
        for value, group in zip(self.x, self.groups, strict=True):
            out[list(group)] = value
        return out


@torch.no_grad()
def merged(
    name: str,
    model: nn.Module,
    given: dict[str, Any],
    x: Tensor,
    removed: list[int],
    proportional: bool = True,
    order: str = "paper",
) -> list[list[Row]]:
    """Run all rows of `x` `[B, N, D]` through the blocks of the unpatched `model`, merging `removed[l]` tokens in block
    l: between its halves or, where it has none, at its end. Returns what each row is after each block."""
    prefix, after = PREFIX.get(name, 1), []
    plains = [None] * DEPTH if name in AT_END else plain_blocks(name, model, given)
    for tokens in x:
        sizes, places = [1.0] * len(tokens), list(range(len(tokens)))
        groups: list[set[int]] = [{i} for i in places]
        rows = []
        for block, plain, r in zip(blocks_of(model), plains, removed, strict=True):
            counted = sizes if proportional else [1.0] * len(sizes)
            if plain is None:
                tokens, metric = whole(name, block, tokens, counted)
            else:
                added, metric = attend(plain, tokens, counted, places, prefix)
                tokens = tokens + added
            tokens, sizes, places, groups = merge(tokens, metric, sizes, places, groups, r, prefix, order)
            if plain is not None:
                tokens = tokens + plain.mlp(plain.norm2(tokens))
            rows.append(Row(tokens, sizes, places, groups))
        after.append(rows)
    return after


def whole(name: str, block: Any, x: Tensor, sizes: list[float]) -> tuple[Tensor, Tensor]:
    """A block of timm without halves on one row, with sizes on its logits, and its keys averaged over heads."""
    if "parallel" in name:
        keys = block.in_proj(block.in_norm(x))[:, -2 * WIDTH : -WIDTH]
        keys = block.k_norm(keys.view(len(keys), HEADS, -1))
    else:
        keys = block.attn.qkv(x)[:, WIDTH : 2 * WIDTH].view(len(x), HEADS, -1)
    mask = x.new_tensor(sizes).log().expand(1, 1, len(sizes), -1)
    return block(x[None], attn_mask=mask)[0], keys.mean(1)
