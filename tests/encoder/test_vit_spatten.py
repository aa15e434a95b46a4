"""SpAtten inside vision encoders: against a dense computation that hides what left, with whole attention matrices."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import hook_counts, snapshot
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from vits import AT_END, DEPTH, HEADS, NAMES, PREFIX, WIDTH, answer, blocks_of, inputs, plain_blocks, run, tiny

import tokenprune
from tokenprune import OptionError, SpAtten, ToMe, UnsupportedModelError, running
from tokenprune.schedule import ramp
from tokenprune.signals import BlockSignals, Budget

FRACTIONS = {16: (1.0, 0.8, 0.3, 0.3), 9: (1.0, 1.0, 0.7, 0.2)}
# After each block: the fraction of the next one, rounded down, but one patch at least.
LEFT = {16: (12, 4, 4, 4), 9: (9, 6, 1, 1)}


class Watch:
    """What the first block got and every block returned, seen behind the hooks of the library."""

    def __init__(self, model: nn.Module) -> None:
        self.got: list[Tensor] = []
        self.gave: dict[int, Tensor] = {}
        for number, block in enumerate(blocks_of(model)):
            block.register_forward_hook(lambda module, args, output, at=number: self._note(at, args, output))

    def _note(self, number: int, args: Any, output: Any) -> None:
        if number == 0:
            self.got = [args[0]]
        self.gave[number] = output[0] if isinstance(output, tuple) else output


def branch(name: str, block: Any, plain: Any, x: Tensor, prefix: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A block on all tokens `[N, D]` of one row, keys of `hidden` tokens masked: its output before anything else is
    done, and its attention matrices `[H, N, N]`."""
    bias = torch.zeros(len(x)).masked_fill(hidden, -math.inf)
    if name in AT_END:
        if "parallel" in name:
            q, k = block.in_proj(block.in_norm(x))[:, -3 * WIDTH : -WIDTH].chunk(2, -1)
        else:
            q, k = block.attn.qkv(x)[:, : 2 * WIDTH].chunk(2, -1)
        q, k = (one.view(len(x), HEADS, -1).transpose(0, 1) for one in (q, k))
        output = block(x[None], attn_mask=bias.expand(1, 1, len(x), -1))[0]
        return output, (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    q, k, v = plain.project(plain.norm1(x))
    if plain.rotate is not None:
        places = torch.arange(len(x) - prefix)
        q, k = (torch.cat([one[:, :prefix], plain.rotate(one[:, prefix:], places)], 1) for one in (q, k))
    matrices = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    x = x + plain.out((matrices @ v).transpose(0, 1).flatten(1))
    return x + plain.mlp(plain.norm2(x)), matrices


@torch.no_grad()
def pruned(name: str, model: nn.Module, given: dict[str, Any], x: Tensor, left: tuple[int, ...]) -> list[Any]:
    """After each block, for each row of `x` `[B, N, D]`: all its tokens, and the patches left, ascending."""
    prefix, after = PREFIX.get(name, 1), [[] for _ in left]
    plains = [None] * DEPTH if name in AT_END else plain_blocks(name, model, given)
    for tokens in x:
        gone, gathered = torch.zeros(len(tokens), dtype=torch.bool), torch.zeros(len(tokens))
        for number, (block, plain) in enumerate(zip(blocks_of(model), plains, strict=True)):
            tokens, matrices = branch(name, block, plain, tokens, prefix, gone)
            gathered = gathered + matrices[:, ~gone].sum((0, 1))
            alive = [i for i in range(prefix, len(tokens)) if not gone[i]]
            best = sorted(alive, key=lambda i: (-float(gathered[i]), i))[: left[number]]
            gone[[i for i in alive if i not in best]] = True
            after[number].append((tokens, [i - prefix for i in sorted(best)]))
    return after


def filled(tokens: Tensor, kept: list[int], prefix: int) -> Tensor:
    """All tokens, each patch that left with the value of the nearest one before it that is left, or of the first."""
    carriers = [max((j for j in kept if j <= i), default=kept[0]) for i in range(len(tokens) - prefix)]
    return tokens[list(range(prefix)) + [prefix + i for i in carriers]]


@pytest.mark.parametrize("n_patches", [16, 9])
@pytest.mark.parametrize("name", NAMES)
def test_the_cascade_is_a_dense_run_that_hides_what_left(name, n_patches):
    model, given, prefix = tiny(name, n_patches), inputs(name, n_patches), PREFIX.get(name, 1)
    bare = tiny(name, n_patches)
    session = tokenprune.patch(model, "spatten", tokens=FRACTIONS[n_patches])
    watch = Watch(model)
    run(model, given)
    after = pruned(name, bare, given, watch.got[0], LEFT[n_patches])
    n_in = n_patches
    for number in range(DEPTH):
        trace, n_out = session.traces[number], LEFT[n_patches][number]
        assert (trace.site, trace.layer, trace.method) == ("encoder_block", number, "spatten")
        assert (trace.n_in, trace.n_out) == ((n_in,) * 2, (n_out,) * 2)
        for row, (tokens, kept) in enumerate(after[number]):
            wanted = filled(tokens, kept, prefix)
            assert watch.gave[number][row].shape == wanted.shape
            assert (watch.gave[number][row] - wanted).abs().max() <= 1e-4 * max(1, float(wanted.abs().max()))
            if n_out == n_in:
                assert trace.status == "skipped"
                continue
            assert trace.place == ("at the end of the block" if name in AT_END else "between attention and MLP")
            carriers = [sum(j <= i for j in kept) - 1 for i in range(n_patches)]
            assert trace.assignment[row].tolist() == [max(0, one) for one in carriers]
        n_in = n_out


@pytest.mark.parametrize("name", ["timm vit", "timm deit distilled", "timm registers", "hf deit", "hf dinov3"])
def test_tokens_before_the_patches_stay_though_they_gather_nothing(name):
    model, given, prefix = tiny(name), inputs(name), PREFIX.get(name, 1)
    session = tokenprune.patch(model, "spatten", tokens=(1.0, 0.2, 0.1, 0.1))
    (method,) = session.methods
    signals = BlockSignals(
        0, torch.zeros(2, 9 + prefix, 4), None, torch.arange(9 + prefix) < prefix,
        torch.cat([torch.full((2, prefix), -1.0), torch.arange(18.0).view(2, 9)], 1),
    )  # fmt: skip
    found = method.encoder_block(signals, Budget(prefix + 2, prefix + 2)).index
    assert found.tolist() == [[*range(prefix), prefix + 7, prefix + 8]] * 2
    lengths = []
    block = blocks_of(model)[-1]
    block.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    run(model, given)
    assert lengths == [prefix + 1]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_pruned_is_bit_identical_also_through_the_gathering_code(name):
    model, given = tiny(name), inputs(name)
    wanted = answer(run(model, given))
    before, hooks = snapshot(model), hook_counts(model)
    session = tokenprune.patch(model, "spatten", tokens=1.0)
    assert torch.equal(answer(run(model, given)), wanted)
    assert [trace.status for trace in session.traces] == ["skipped"] * DEPTH
    session.forced = True
    assert torch.equal(answer(run(model, given)), wanted)
    assert [(trace.status, trace.n_out) for trace in session.traces] == [("applied", (16, 16))] * DEPTH
    tokenprune.patch(model, "spatten", tokens=0.6)
    assert not torch.equal(answer(run(model, given)), wanted)
    tokenprune.unpatch(model)
    assert (snapshot(model), hook_counts(model)) == (before, hooks)
    assert torch.equal(answer(run(model, given)), wanted)
    assert running.innermost() is None


@pytest.mark.parametrize("name", ["timm vit", "timm rope", "timm parallel", "hf siglip2", "hf dinov3"])
def test_a_row_does_not_depend_on_those_beside_it(name):
    model, given = tiny(name), inputs(name, n_rows=3)
    session = tokenprune.patch(model, "spatten", tokens=0.6)
    found, together = answer(run(model, given)), session.traces[2].assignment
    for row in range(3):
        alone = answer(run(model, {key: value[row : row + 1] for key, value in given.items()}))
        assert torch.allclose(alone[0], found[row], atol=1e-5, rtol=1e-5)
        assert torch.equal(session.traces[2].assignment[0], together[row])


@settings(deadline=None, max_examples=100, database=None)
@given(st.floats(0.3, 1.0), st.integers(4, 24), st.integers(0, 600))
def test_counts_follow_the_schedule_of_the_decoder(tokens, n_layers, n_tokens):
    kept = ramp(tokens, n_layers=n_layers, free=0.15)
    left = n_tokens
    for layer, r in enumerate(SpAtten(tokens=tokens).in_encoder().removals(n_layers=n_layers, n_tokens=n_tokens)):
        left -= r
        due = math.floor(kept[min(layer + 1, n_layers - 1)] * n_tokens + 1e-6)
        assert r >= 0
        assert left == (max(1, due) if n_tokens else 0)


def test_after_merging_a_token_has_what_its_group_gathered_and_sizes_count():
    name = "timm vit"
    model, given = tiny(name), inputs(name)
    session = tokenprune.patch(model, [ToMe(r=[2]), SpAtten(tokens=(1.0, 1.0, 0.5, 0.5))])
    seen, method = [], session.methods[1]
    inner = type(method).encoder_block
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            type(method),
            "encoder_block",
            lambda self, signals, budget: seen.append(signals) or inner(self, signals, budget),
        )
        blocks, got = blocks_of(model), []
        for block in blocks[:2]:
            block.register_forward_pre_hook(lambda module, args: got.append(args[0]))
        run(model, given)
    (signals,) = seen
    assert signals.layer == 1
    assert [trace.n_out for trace in session.traces if trace.status == "applied"] == [(14, 14), (6, 6)]
    # Every query of every head gives one unit away: 17 queries in the first block, 15 in the second.
    assert torch.allclose(signals.importance.sum(1), torch.tensor(float(HEADS * (17 + 15))).expand(2), atol=1e-3)
    groups = session.traces[0].assignment
    plains = plain_blocks(name, model, given)
    with torch.no_grad():
        for row in range(2):
            _, first = branch(name, blocks[0], plains[0], got[0][row], 1, torch.zeros(17, dtype=torch.bool))
            q, k, _ = plains[1].project(plains[1].norm1(got[1][row]))
            logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + signals.sizes[row].log()
            wanted = logits.softmax(-1).sum((0, 1))
            wanted[0] += first[:, :, 0].sum()
            wanted[1:].scatter_add_(0, groups[row], first[:, :, 1:].sum((0, 1)))
            assert (signals.importance[row] - wanted).abs().max() <= 1e-4


def test_gradients_go_through():
    model, given = tiny("timm eva02").train(), inputs("timm eva02")
    tokenprune.patch(model, "spatten", tokens=0.6)
    model(**given).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", ["timm rope", "timm dinov3", "hf dinov3"])
def test_other_dtypes_go_through(name):
    model = tiny(name).to(torch.bfloat16)
    given = {key: value.to(torch.bfloat16) for key, value in inputs(name).items()}
    try:
        run(model, given)
    except RuntimeError as error:
        if name != "timm rope":
            raise
        pytest.skip(f"rotary embeddings with learned frequencies of this timm do not run in bfloat16: {error}")
    session = tokenprune.patch(model, "spatten", tokens=0.6)
    assert answer(run(model, given)).isfinite().all()
    assert session.traces[-1].n_out == (3, 3)


def test_patched_then_compiled_gives_the_same():
    model, given = tiny("timm vit"), inputs("timm vit")
    tokenprune.patch(model, "spatten", tokens=0.6)
    wanted = run(model, given)
    torch._dynamo.reset()  # else a graph is used again that an unpatched model of this class has left
    assert torch.allclose(run(torch.compile(model, backend="eager"), given), wanted, atol=1e-6)


class Broken(RuntimeError):
    """Raised by a hook of a test."""


def check_exceptions(model: nn.Module, given: dict[str, Any], modules: tuple[nn.Module, ...]) -> None:
    """An exception behind any of `modules` leaves nothing behind."""
    wanted = run(model, given)

    def raise_it(*args: Any) -> None:
        raise Broken

    for module in modules:
        handle = module.register_forward_hook(raise_it)
        with pytest.raises(Broken):
            run(model, given)
        handle.remove()
        assert running.innermost() is None
        assert torch.equal(run(model, given), wanted)


def test_an_exception_leaves_nothing_behind():
    model = tiny("timm vit")
    tokenprune.patch(model, "spatten", tokens=0.6)
    check_exceptions(model, inputs("timm vit"), (model.blocks[1].attn.proj, model.blocks[2].mlp))


# --- refusals -------------------------------------------------------------------------------------


def refused(model: nn.Module, error: type[Exception], *parts: str, **options: Any) -> Exception:
    """What `patch` raises: an `error` with all of `parts`, which leaves `model` as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        tokenprune.patch(model, "spatten", **options)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert snapshot(model) == before
    return caught.value


@pytest.mark.parametrize(("options", "parts"), [
    ({"values": 0.5}, ("values=0.5", "no decoding steps")),
    ({"protect_text": False}, ("protect_text=False", "no text")),
    ({"protect_text": False, "kv": "per_step"}, ("protect_text=False",)),
    ({"tokens": (1.0, 0.5)}, ("tokens gives 2 layers a fraction", "there are 4")),
    ({"tokens": 0.2}, ("an average of 0.2 cannot be kept over 4 layers",)),
    ({"positions": "packed"}, ("positions", "original")),
])  # fmt: skip
def test_options_that_mean_nothing_in_an_encoder_are_refused(options, parts):
    refused(tiny("timm vit"), OptionError, *parts, **options)
    refused(tiny("hf vit"), OptionError, *parts, **options)


def test_a_schedule_that_does_not_fit_is_refused_also_where_images_may_have_any_size():
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, dynamic_img_size=True)
    refused(model, OptionError, "tokens gives 2 layers a fraction", tokens=(1.0, 0.5))


class Cooler(Attention):
    """An attention whose queries are changed behind their norm."""

    factors = (0.5,)

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        parts = [nn.functional.scaled_dot_product_attention(q * one, k, v, attn_mask=attn_mask) for one in self.factors]
        return self.proj(sum(parts).transpose(1, 2).flatten(2))


class Twice(Cooler):
    """An attention that attends twice."""

    factors = (1.0, 1.0)


@pytest.mark.parametrize(("kind", "reason"), [(Cooler, "not made of the queries"), (Twice, "2 were seen")])
def test_an_attention_that_is_not_what_was_read_is_refused(kind, reason):
    model = tiny("timm vit")
    model.blocks[1].attn.__class__ = kind
    refused(model, UnsupportedModelError, "block 1", reason)
    assert tokenprune.patch(model, "tome", r=1).installed
