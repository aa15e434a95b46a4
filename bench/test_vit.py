"""Throughput of vision transformers with merged tokens: dense, ToMe, a straightforward ToMe, and what FLOPs allow.

timm models with random weights (time does not depend on them), fp32 on a CPU and bf16 on CUDA. All candidates of one
row run in turn, in one process; every ratio is the median of the ratios within a round.

Candidates:
    dense            unpatched, fused attention.
    tome             patched with ToMe: fused attention, merging between attention and MLP.
    straightforward  the paper's maths written down as they stand: attention materialised (the sizes go on its logits),
                     sources and destinations split, sorted, gathered and scattered, then joined.
    sliced           as many tokens in every half of every block as with ToMe, but the last ones are cut off: what would
                     be left of the time if merging were free.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from measuring import Timing, alternate, flops_g
from torch import Tensor, nn

import tokenprune
from tokenprune import ops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
# Name, r as published, the least dense / tome that is aimed at, by batch the repeats on a CPU.
MODELS = {
    "vit_base_patch16_224": (13, 1.35 if CUDA else 1.5, {1: 9, 8: 5, 32: 2}),
    "vit_large_patch16_224": (8, None, {1: 5, 8: 1, 32: 1}),
    "vit_large_patch16_384": (23, 1.8 if CUDA else 1.9, {1: 5, 8: 1, 32: 1}),
}
CASES = [
    (name, batch, 21 if CUDA else repeats)
    for name, (_, _, batches) in MODELS.items()
    for batch, repeats in (dict.fromkeys((1, 8, 32, 128)) if CUDA else batches).items()
]


def make(name: str) -> Any:
    """A model with random weights."""
    torch.manual_seed(0)
    return timm.create_model(name).to(DEVICE, DTYPE).eval()


def twin(model: nn.Module) -> nn.Module:
    """A second model over the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def images(model: Any, batch: int) -> Tensor:
    """Random pixels."""
    return torch.randn(batch, 3, *model.patch_embed.img_size, device=DEVICE, dtype=DTYPE)


def embed(model: Any, pixels: Tensor) -> Tensor:
    """What enters the first block."""
    x: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
    return x


def attend(attention: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Proportional attention with its matrix in memory: its output, and the keys averaged over heads."""
    rows, n, width = x.shape
    q, k, v = attention.qkv(x).view(rows, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q * attention.scale) @ k.transpose(2, 3)
    if size is not None:
        logits = logits + size.log().view(rows, 1, 1, n)
    x = (logits.softmax(-1) @ v).transpose(1, 2).reshape(rows, n, width)
    return attention.proj(x), k.mean(1)


def merge(x: Tensor, keys: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """One round: `r` even tokens go into odd ones; the class token, the first one, stays."""
    unit = keys / keys.norm(dim=2, keepdim=True)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf
    best, partner = similarity.max(2)
    order = best.argsort(1, descending=True)
    gone, left = order[:, :r, None], order[:, r:].sort(1).values[:, :, None]
    into = partner[:, :, None].gather(1, gone)

    def joined(values: Tensor) -> Tensor:
        even, odd = values[:, ::2], values[:, 1::2]
        width = values.shape[2]
        taken = even.gather(1, gone.expand(-1, -1, width))
        odd = odd.scatter_add(1, into.expand(-1, -1, width), taken)
        return torch.cat([even.gather(1, left.expand(-1, -1, width)), odd], 1)

    size, total = joined(size), joined(x * size)
    return total / size, size


def straightforward(model: Any, pixels: Tensor, removed: list[int]) -> Tensor:
    """Logits with `removed[i]` tokens merged in block i."""
    x = embed(model, pixels)
    size = None
    for block, r in zip(model.blocks, removed, strict=True):
        out, keys = attend(block.attn, block.norm1(x), size)
        x = x + out
        if r:
            x, size = merge(x, keys, torch.ones_like(x[:, :, :1]) if size is None else size, r)
        x = x + block.mlp(block.norm2(x))
    logits: Tensor = model.forward_head(model.norm(x))
    return logits


def sliced(model: Any, pixels: Tensor, removed: list[int]) -> Tensor:
    """The blocks over ever fewer tokens: the last `removed[i]` ones are cut off in block i."""
    x = embed(model, pixels)
    for block, r in zip(model.blocks, removed, strict=True):
        x = (x + block.attn(block.norm1(x)))[:, : x.shape[1] - r]
        x = x + block.mlp(block.norm2(x))
    logits: Tensor = model.forward_head(model.norm(x))
    return logits


def ratio(upper: Timing, lower: Timing) -> list[float]:
    """20 % quantile, median and 80 % quantile of the ratios within one round."""
    ratios = upper.over(lower)
    return [round(ratios.quantile(fraction), 4) for fraction in (0.2, 0.5, 0.8)]


@pytest.mark.parametrize(("name", "batch", "repeats"), CASES)
@torch.inference_mode()
def test_vit(record: Callable[..., None], name: str, batch: int, repeats: int) -> None:
    """Dense, merged, and merged in the straightforward way."""
    r, target, _ = MODELS[name]
    dense = make(name)
    patched, pixels = twin(dense), images(dense, batch)
    session = tokenprune.patch(patched, "tome", r=r)
    n_patches, tolerance = dense.patch_embed.num_patches, 5e-2 if CUDA else 1e-4
    removed = list(tokenprune.ToMe(r=r).removals(n_layers=len(dense.blocks), n_tokens=n_patches))
    # After one round the order of the tokens differs, and with it who may merge in the next: one round is compared.
    once = [r] + [0] * (len(removed) - 1)
    with tokenprune.patch(twin(dense), "tome", r=once) as other:
        expected = straightforward(dense, pixels[:1], once)
        torch.testing.assert_close(other.model(pixels[:1]), expected, atol=tolerance, rtol=tolerance)
    candidates: dict[str, Callable[[], object]] = {"dense": lambda: dense(pixels), "tome": lambda: patched(pixels)}
    if CUDA or batch * dense.embed_dim <= 32 * 768:  # a forward of the largest ones takes a minute on a CPU
        candidates["straightforward"] = lambda: straightforward(dense, pixels, removed)
        candidates["sliced"] = lambda: sliced(dense, pixels, removed)
    times = alternate(
        candidates,
        repeats=repeats,
        warmup=int(CUDA or repeats > 2),  # the longest runs are warm within a fraction of theirs
        device=DEVICE,
    )
    allowed = flops_g(lambda: dense(pixels[:1])) / flops_g(lambda: sliced(dense, pixels[:1], removed))
    speedup, others = ratio(times["dense"], times["tome"]), dict[str, list[float]]()
    if "straightforward" in times:
        others["dense_over_straightforward"] = ratio(times["dense"], times["straightforward"])
        others["dense_over_sliced"] = ratio(times["dense"], times["sliced"])
        others["straightforward_over_tome"] = ratio(times["straightforward"], times["tome"])
    row = {
        "what": "throughput",
        "model": name,
        "batch": batch,
        "r": r,
        "tokens": [n_patches + 1, n_patches + 1 - sum(removed)],
        "dtype": str(DTYPE).removeprefix("torch."),
        "repeats": repeats,
        **{f"{key}_images_per_s": round(batch / time.median * 1e3, 2) for key, time in times.items()},
        "dense_over_tome": speedup,
        **others,
        "flops_ratio": round(allowed, 4),
        "of_flops_ratio": round(speedup[1] / allowed, 4),
        "target": f"dense_over_tome >= {target or round(0.9 * allowed, 2)}",
        "met": speedup[1] >= (target or 0.9 * allowed),
    }
    record(lambda: patched(pixels), row)
    session.remove()


SHARES = [(name, batch) for name, batch, _ in CASES if name != "vit_large_patch16_224"]


@pytest.mark.parametrize(("name", "batch"), SHARES)
@torch.inference_mode()
def test_share(record: Callable[..., None], name: str, batch: int) -> None:
    """Matching and merging of the first block, beside the block itself."""
    r, _, _ = MODELS[name]
    model = make(name)
    block = model.blocks[0]
    x = embed(model, images(model, batch))
    keys = block.attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, block.attn.num_heads, -1)[:, :, 1].mean(2)
    protected, size = torch.arange(x.shape[1]) < 1, torch.ones(x.shape[:2], device=DEVICE)

    def match() -> ops.BipartiteMatch:
        return ops.bipartite_match(keys, r=r, protected=protected)

    def merge_() -> ops.MergedTokens:
        return ops.merge_tokens(x, assign, n_out=x.shape[1] - r, weight=size)

    assign = match().assign
    times = alternate({"block": lambda: block(x), "match": match, "merge": merge_}, repeats=21, device=DEVICE)
    both = Timing(tuple(a + b for a, b in zip(times["match"].samples, times["merge"].samples, strict=True)))
    share, target = ratio(both, times["block"]), 0.08 if CUDA else 0.05
    row = {
        "what": "share of matching and merging in the time of a block",
        "model": name,
        "batch": batch,
        "r": r,
        "tokens": x.shape[1],
        "dtype": str(DTYPE).removeprefix("torch."),
        **{f"{key}_latency_ms": round(time.median, 3) for key, time in times.items()},
        "share": share,
        "target": f"share <= {target}",
        "met": share[1] <= target,
    }
    record(match, row)
