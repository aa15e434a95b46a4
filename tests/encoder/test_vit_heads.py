"""SpAtten's heads inside vision encoders: against dense runs in which heads that left are zeros before the output
projection."""

import copy
import gc
import io
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from states import hook_counts, in_threads, replica_of, snapshot
from test_vit_spatten import Watch, check_exceptions, filled, refused
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional
from vits import AT_END, DEPTH, HEADS, NAMES, PATCH, PREFIX, WIDTH, answer, blocks_of, inputs, plain_blocks, run, tiny

import tokenprune
from tokenprune import InputError, OptionError, SpAtten, ToMe, UnsupportedModelError, running

TAKING = tuple(name for name in NAMES if name != "timm parallel")
FRACTIONS, COUNTS = (1.0, 1.0, 0.67, 0.34), (3, 3, 2, 1)
K = WIDTH // HEADS


def place(block: Any) -> str:
    """Name of a block's attention."""
    return next(name for name in ("attn", "attention", "self_attn") if hasattr(block, name))


def attention_of(block: Any) -> Any:
    return getattr(block, place(block))


def output_of(block: Any) -> str:
    """Name of the output projection of a block's attention."""
    return next(name for name in ("proj", "o_proj", "out_proj") if hasattr(attention_of(block), name))


def rows_of(name: str, n_rows: int, seed: int = 0) -> dict[str, Any]:
    """Images of different brightness and contrast, so that not all keep the same heads of most models."""
    given = inputs(name, n_rows=n_rows, seed=seed)
    key = "x" if name.startswith("timm") else "pixel_values"
    for row in range(1, n_rows):
        given[key][row] = given[key][row] * (4.0 if row == 1 else 0.05) + (2.0 if row == 2 else 0.0)
    return given


def rows_that_differ(name: str) -> dict[str, Any]:
    """The first three images that do not all keep the same heads: which they are hangs on the weights timm draws."""
    for seed in range(20):
        given = rows_of(name, 3, seed)
        if any(row != rows[0] for rows in zeroed(tiny(name), given)[1] for row in rows):
            return given
    raise AssertionError(f"all images keep the same heads of {name}")


def best(scores: Tensor, among: list[int], n: int) -> list[int]:
    return sorted(sorted(among, key=lambda i: (-float(scores[i]), i))[:n])


def zeroed(model: nn.Module, given: dict[str, Any], counts: tuple[int, ...] = COUNTS) -> tuple[Tensor, list[Any]]:
    """The answer of an unpatched model whose heads become zeros by the rule, and the heads that each block kept."""
    state: dict[str, Any] = {"scores": None, "kept": []}

    def hook(module: nn.Module, args: Any, number: int) -> Any:
        heads = args[0].unflatten(-1, (HEADS, -1)).clone()
        earlier = state["kept"][-1] if state["kept"] else [list(range(HEADS))] * len(heads)
        kept = earlier
        if counts[number] < HEADS:
            kept = [best(state["scores"][row], earlier[row], counts[number]) for row in range(len(heads))]
        for row, some in enumerate(kept):
            heads[row][:, [i for i in range(HEADS) if i not in some]] = 0
        state["kept"].append(kept)
        magnitude = heads.abs().sum((1, 3))
        state["scores"] = magnitude if state["scores"] is None else state["scores"] + magnitude
        return (heads.flatten(2),)

    for number, block in enumerate(blocks_of(model)):
        getattr(attention_of(block), output_of(block)).register_forward_pre_hook(
            lambda module, args, at=number: hook(module, args, at)
        )
    return answer(run(model, given)), state["kept"]


def weights_used(model: nn.Module, given: dict[str, Any]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The model's answer, and in order the shapes of the weights that are no parameters of it."""
    seen, real, whole = [], functional.linear, {id(one) for one in model.parameters()}

    def linear(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
        if id(weight) not in whole:
            seen.append(tuple(weight.shape))
        return real(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", linear)
        return answer(run(model, given)), seen


def near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * max(1, float(wanted.abs().max())))


@pytest.mark.parametrize("name", TAKING)
def test_one_row_projects_kept_heads_only_and_is_a_dense_run_with_zeros(name):
    model, given = tiny(name), inputs(name, n_rows=1)
    dense = answer(run(model, given))
    session = tokenprune.patch(model, "spatten", tokens=1.0, heads=FRACTIONS)
    found, shapes = weights_used(model, given)
    wanted, kept = zeroed(tiny(name), given)
    assert near(found, wanted)
    assert not near(found, dense)
    assert [len(rows[0]) for rows in kept] == [*COUNTS]
    assert session.remarks == ("Blocks 0 to 3 keep 3, 3, 2, 1 of 3 heads.",)
    fused = [(3 * 2 * K, WIDTH), (WIDTH, 2 * K), (3 * K, WIDTH), (WIDTH, K)]
    split = [*[(2 * K, WIDTH)] * 3, (WIDTH, 2 * K), *[(K, WIDTH)] * 3, (WIDTH, K)]
    assert shapes[:4] == fused or shapes[:8] == split  # what comes behind the blocks may cut its own


@pytest.mark.parametrize("name", TAKING)
def test_rows_that_keep_different_heads_are_dense_runs_with_zeros(name):
    model, given = tiny(name), rows_that_differ(name)
    tokenprune.patch(model, "spatten", tokens=1.0, heads=FRACTIONS)
    found, shapes = weights_used(model, given)
    wanted, kept = zeroed(tiny(name), given)
    assert near(found, wanted)
    differ = [any(row != rows[0] for row in rows) for rows in kept]
    assert len({(WIDTH, 2 * K), (WIDTH, K)} & set(shapes)) == 2 - sum(differ)
    for row in range(3):
        alone = answer(run(model, {key: value[row : row + 1] for key, value in given.items()}))
        assert near(alone[0], found[row])


@torch.no_grad()
def cascade(
    name: str, model: nn.Module, given: dict[str, Any], x: Tensor, left: tuple[int, ...], counts: tuple[int, ...]
) -> list[list[tuple[Tensor, list[int]]]]:
    """After each block, for each row of `x` `[B, N, D]`: all its tokens and the patches left, by whole matrices."""
    prefix, after = PREFIX.get(name, 1), [[] for _ in left]
    for tokens in x:
        gone, gathered = torch.zeros(len(tokens), dtype=torch.bool), torch.zeros(len(tokens))
        heads, scores = list(range(HEADS)), torch.zeros(HEADS)
        for number, plain in enumerate(plain_blocks(name, model, given)):
            heads = best(scores, heads, counts[number])
            q, k, v = plain.project(plain.norm1(tokens))
            if plain.rotate is not None:
                places = torch.arange(len(tokens) - prefix)
                q, k = (torch.cat([one[:, :prefix], plain.rotate(one[:, prefix:], places)], 1) for one in (q, k))
            bias = torch.zeros(len(tokens)).masked_fill(gone, -math.inf)
            matrices = (q @ k.transpose(1, 2) / math.sqrt(K) + bias).softmax(-1)
            states = matrices @ v
            states[[i for i in range(HEADS) if i not in heads]] = 0
            scores = scores + states[:, ~gone].abs().sum((1, 2))
            gathered = gathered + matrices[heads][:, ~gone].sum((0, 1))
            tokens = tokens + plain.out(states.transpose(0, 1).flatten(1))
            tokens = tokens + plain.mlp(plain.norm2(tokens))
            alive = [i for i in range(prefix, len(tokens)) if not gone[i]]
            some = best(gathered, alive, left[number])
            gone[[i for i in alive if i not in some]] = True
            after[number].append((tokens, [i - prefix for i in some]))
    return after


def check_cascade(
    name: str, given: dict[str, Any], watch: Watch, left: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    after = cascade(name, tiny(name), given, watch.got[0], left, counts)
    for number, rows in enumerate(after):
        for row, (tokens, kept) in enumerate(rows):
            assert near(watch.gave[number][row], filled(tokens, kept, PREFIX.get(name, 1)))


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("name", [name for name in TAKING if name not in AT_END])
def test_tokens_leave_by_the_attention_of_the_heads_that_are_left(name, n_rows):
    model, given = tiny(name), rows_of(name, n_rows)
    session = tokenprune.patch(model, "spatten", tokens=(1.0, 0.8, 0.3, 0.3), heads=(1.0, 0.67, 0.67, 0.34))
    watch = Watch(model)
    run(model, given)
    assert [trace.n_out[0] for trace in session.traces] == [12, 4, 4, 4]
    check_cascade(name, given, watch, (12, 4, 4, 4), (3, 2, 2, 1))


@pytest.mark.parametrize("tokens", [1.0, 0.6])
@pytest.mark.parametrize("name", ["timm vit", "timm dinov3", "timm beit", "hf clip"])
def test_with_all_heads_nothing_is_new(name, tokens):
    model, given = tiny(name), inputs(name)
    kinds = [type(module) for module in model.modules()]
    session = tokenprune.patch(model, "spatten", tokens=tokens)
    wanted = answer(run(model, given))
    session = tokenprune.patch(model, "spatten", tokens=tokens, heads=(1.0,) * DEPTH)
    assert session.remarks == ()
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(answer(run(model, given)), wanted)


@pytest.mark.filterwarnings("ignore:this .* is a copy of a patched one")
@pytest.mark.parametrize("name", TAKING)
def test_unpatching_restores_the_very_modules_and_copies_are_unpatched(name):
    model, given = tiny(name), inputs(name)
    wanted, before, modules = answer(run(model, given)), snapshot(model), dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for _ in range(2):
        session = tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
    found = answer(run(model, given))
    assert not torch.equal(found, wanted)
    assert {key: id(one) for key, one in model.named_parameters()} == {key: id(one) for key, one in parameters.items()}
    assert [key for key, one in model.named_modules() if type(one).__name__ != type(modules[key]).__name__] == []
    assert [key for key, one in model.named_modules() if not isinstance(one, type(modules[key]))] == []
    with session.pause():
        assert torch.equal(answer(run(model, given)), wanted)
    copies = [copy.deepcopy(model)]
    if name.startswith("timm vit") or name == "hf vit":
        copies.append(pickle.loads(pickle.dumps(model)))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies.append(torch.load(buffer, weights_only=False))
    for one in copies:
        assert torch.equal(answer(run(one, given)), wanted)
        assert not hasattr(attention_of(blocks_of(one)[0]), "standing_for")
    tokenprune.unpatch(model)
    assert {key: id(one) for key, one in model.named_modules()} == {key: id(one) for key, one in modules.items()}
    assert (snapshot(model), hook_counts(model)) == (before, {})
    assert torch.equal(answer(run(model, given)), wanted)


class Wrapped(nn.Module):
    """What is put around an attention; it has the attention's attributes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.base(x, **kwargs)


@pytest.mark.parametrize("name", ["timm vit", "timm beit"])
def test_what_others_put_around_an_attention_stays_when_the_patch_goes(name):
    model, given = tiny(name), inputs(name)
    block, original = blocks_of(model)[2], attention_of(blocks_of(model)[2])
    dense = answer(run(model, given))
    tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
    pruned = answer(run(model, given))
    wrapped = Wrapped(attention_of(block))
    setattr(block, place(block), wrapped)
    assert torch.equal(answer(run(model, given)), pruned)
    tokenprune.unpatch(model)
    assert attention_of(block) is wrapped
    assert wrapped.base is original
    assert torch.equal(answer(run(model, given)), dense)
    for _ in range(2):
        tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
        assert near(answer(run(model, given)), pruned)
    tokenprune.unpatch(model)
    assert (attention_of(block), wrapped.base) == (wrapped, original)
    assert torch.equal(answer(run(model, given)), dense)


@pytest.mark.parametrize("name", ["timm vit", "timm beit", "hf vit"])
def test_patching_again_lets_go_of_earlier_patches(name):
    model, given, sessions = tiny(name), inputs(name), []
    for _ in range(3):
        sessions.append(weakref.ref(tokenprune.patch(model, "spatten", tokens=0.7, heads=FRACTIONS)))
        run(model, given)
    gc.collect()
    assert [ref() is None for ref in sessions] == [True, True, False]


@pytest.mark.parametrize("name", ["timm vit", "hf vit"])
def test_a_patch_that_is_refused_leaves_the_one_before_it_in_force(name):
    model, given = tiny(name), inputs(name)
    session = tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
    pruned = answer(run(model, given))
    refused(model, OptionError, "heads gives 2 layers", heads=(1.0, 0.5))
    assert session.installed
    assert torch.equal(answer(run(model, given)), pruned)


def test_an_attention_without_its_session_is_itself():
    model, given = tiny("timm vit"), inputs("timm vit")
    dense = run(model, given)
    tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
    left = model.blocks[2].attn
    tokenprune.unpatch(model)
    model.blocks[2].attn = left
    assert torch.equal(run(model, given), dense)


def test_an_exception_leaves_nothing_behind():
    model, given = tiny("timm vit"), inputs("timm vit", n_rows=1)
    tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
    check_exceptions(model, given, (model.blocks[2].attn, model.blocks[2].attn.proj, model.blocks[3].mlp))
    model.blocks[1].attn = tiny("timm vit").blocks[1].attn
    with pytest.raises(InputError, match="attention of block 1 was not called"):
        run(model, given)
    assert running.innermost() is None


class WholeLinear(nn.Linear):
    """What a quantized layer is to us: not a plain one."""


@pytest.mark.parametrize("name", ["timm vit", "timm eva", "hf siglip", "hf dinov3"])
def test_what_is_no_plain_linear_layer_is_left_whole_and_the_report_says_so(name):
    model, given = tiny(name), inputs(name, n_rows=1)
    seen = []
    for number, block in enumerate(blocks_of(model)):
        projection = getattr(attention_of(block), output_of(block))
        if number == 3:
            projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
        else:
            projection.__class__ = WholeLinear
    session = tokenprune.patch(model, "spatten", tokens=1.0, heads=FRACTIONS)
    out = output_of(blocks_of(model)[0])
    assert session.remarks[1:] == (
        f"Blocks 2 project all heads, because {out} is a WholeLinear; pruned ones are zeroed, not skipped.",
        f"Blocks 3 project all heads, because {out} has hooks; pruned ones are zeroed, not skipped.",
    )
    seen.clear()
    found, shapes = weights_used(model, given)
    assert seen == [WIDTH]
    assert not {(2 * K, WIDTH), (K, WIDTH), (WIDTH, 2 * K), (WIDTH, K)} & set(shapes)
    assert near(found, zeroed(tiny(name), given)[0])
    assert "is a WholeLinear" in " ".join(str(session.report()).split())


def test_hooks_that_come_later_see_everything():
    model, given, seen = tiny("timm vit"), inputs("timm vit", n_rows=1), []
    tokenprune.patch(model, "spatten", tokens=1.0, heads=FRACTIONS)
    model.blocks[2].attn.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model.blocks[2].attn.register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output.shape)))
    assert near(run(model, given), zeroed(tiny("timm vit"), given)[0])
    assert seen == [(1, 17, WIDTH), ((1, 17, WIDTH), (1, 17, WIDTH))]


def test_the_report_measures_fewer_operations():
    model, given = tiny("timm vit"), inputs("timm vit", n_rows=1)
    session = tokenprune.patch(model, "spatten", tokens=1.0, heads=FRACTIONS)
    text = str(session.report(given["x"], repeats=1))
    assert "keep 3, 3, 2, 1 of 3 heads" in text
    assert "No tokens were pruned" in text
    cost = next(one for one in session.report(given["x"], repeats=1).costs if one.name == "total_flops_g")
    assert cost.pruned < cost.dense


@pytest.mark.parametrize("n_rows", [1, 3])
def test_merging_goes_by_the_keys_of_the_heads_that_are_left(n_rows):
    name = "timm rope"
    model, given = tiny(name), rows_of(name, n_rows)
    session = tokenprune.patch(model, [ToMe(r=[0, 0, 3]), SpAtten(tokens=1.0, heads=FRACTIONS)])
    seen, inner = [], ToMe.encoder_block
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            ToMe, "encoder_block", lambda self, signals, budget: seen.append(signals) or inner(self, signals, budget)
        )
        got = []
        blocks_of(model)[2].register_forward_pre_hook(lambda module, args: got.append(args[0]))
        run(model, given)
    (signals,), (x,) = seen, got
    assert [trace.n_out for trace in session.traces if trace.status == "applied"] == [(13,) * n_rows]
    _, kept = zeroed(tiny(name), given)
    plain = plain_blocks(name, tiny(name), given)[2]
    with torch.no_grad():
        for row in range(n_rows):
            keys = plain.project(plain.norm1(x[row]))[1][kept[2][row]].mean(0)
            assert near(signals.keys[row], keys)


def test_two_threads_do_not_mix():
    model = tiny("timm vit")
    tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
    many = [inputs("timm vit", n_rows=1, seed=seed) for seed in range(2)]
    wanted = [run(model, given) for given in many]
    found = in_threads(*[lambda given=given: [run(model, given) for _ in range(5)] for given in many])
    for one, runs in zip(wanted, found, strict=True):
        assert all(torch.equal(one, other) for other in runs)


@pytest.mark.parametrize("name", ["timm vit", "timm dinov3", "timm beit", "hf vit"])
def test_replicas_of_data_parallel_prune_as_the_model_does(name):
    model, given = tiny(name), inputs(name)
    dense = answer(run(model, given))
    tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
    pruned = answer(run(model, given))
    (found,) = in_threads(lambda: answer(run(replica_of(model), given)))
    assert near(found, pruned)
    assert not near(found, dense)
    attention_of(blocks_of(replica_of(model))[2]).register_buffer("own", None)
    assert not hasattr(attention_of(blocks_of(model)[2]), "own")
    tokenprune.unpatch(model)
    assert torch.equal(answer(run(replica_of(model), given)), dense)


@pytest.mark.parametrize("name", ["hf vit", "hf dinov3"])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_unfused_attention_gives_the_same_and_its_probabilities_with_zeros(name, n_rows):
    model, given = tiny(name), rows_of(name, n_rows)
    model.set_attn_implementation("eager")
    tokenprune.patch(model, "spatten", tokens=1.0, heads=FRACTIONS)
    wanted, kept = zeroed(tiny(name), given)
    output = run(model, given, output_attentions=True)
    assert near(answer(output), wanted)
    assert len(output.attentions) == DEPTH
    for weights, rows in zip(output.attentions, kept, strict=True):
        for row, some in enumerate(rows):
            assert weights.shape[1] == HEADS
            assert [i for i in range(HEADS) if weights[row, i].any()] == some


def test_gradients_and_other_dtypes_go_through():
    for name in ("timm eva02", "hf clip"):
        model, given = tiny(name).train(), inputs(name)
        tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
        answer(model(**given)).square().sum().backward()
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        assert gradients
        assert all(one.isfinite().all() for one in gradients)
        model, given = tiny(name).to(torch.bfloat16), inputs(name)
        tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
        assert answer(run(model, {key: value.to(torch.bfloat16) for key, value in given.items()})).isfinite().all()


def test_patched_then_compiled_gives_the_same():
    model, given = tiny("timm vit"), inputs("timm vit")
    tokenprune.patch(model, "spatten", tokens=0.6, heads=FRACTIONS)
    wanted = run(model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(run(compiled, given), wanted, atol=1e-6)
    tokenprune.unpatch(model)
    torch._dynamo.reset()
    assert torch.equal(run(model, given), run(tiny("timm vit"), given))


# --- refusals -------------------------------------------------------------------------------------


class Doubled(Attention):
    """An attention whose values are changed behind their projection."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        states = functional.scaled_dot_product_attention(q, k, 2 * v, attn_mask=attn_mask)
        return self.proj(states.transpose(1, 2).flatten(2))


class Gated(Attention):
    """An attention whose output projection looks at its input, too."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        states = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        return self.proj(states.transpose(1, 2).flatten(2), x)


def test_attention_that_cannot_do_with_fewer_heads_is_refused():
    works, asked = "heads=1.0 works", {"heads": FRACTIONS, "tokens": 1.0}
    refused(
        tiny("timm parallel"),
        UnsupportedModelError,
        "block 0 (ParallelScalingBlock)",
        "no attention of its own",
        works,
        **asked,
    )
    model = tiny("timm vit")
    model.blocks[1].attn.__class__ = Doubled
    refused(
        model,
        UnsupportedModelError,
        "block 1 (Block) of VisionTransformer",
        "not made of the projections",
        works,
        **asked,
    )
    assert tokenprune.patch(model, "spatten").installed
    model = tiny("timm vit")
    model.blocks[3].attn.__class__ = Gated
    model.blocks[3].attn.proj = nn.Bilinear(WIDTH, WIDTH, WIDTH)
    cause = refused(
        model, UnsupportedModelError, "block 3", "not made of the projections", "missing 1 required", works, **asked
    ).__cause__
    assert isinstance(cause, TypeError)
    model = tiny("timm vit")
    model.blocks[2].attn.forward = model.blocks[2].attn.forward
    refused(model, UnsupportedModelError, "block 2", "a forward of its own", works, **asked)
    model = Eva(
        img_size=32, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=5,
        scale_attn_inner=True, use_rot_pos_emb=False,
    )  # fmt: skip
    refused(model, UnsupportedModelError, "block 0", "a norm of all heads before its output projection", works, **asked)


@pytest.mark.parametrize(("options", "parts"), [
    ({"heads": (1.0, 0.5)}, ("heads gives 2 layers a fraction", "there are 4")),
    ({"heads": 0.0}, ("heads must be a fraction in (0, 1]", "got 0.0")),
    ({"heads": (0.5, 0.5, 0.5, 0.5)}, ("heads as a sequence starts with 1.0",)),
    ({"heads": 0.2}, ("an average of 0.2 cannot be kept over 4 layers",)),
])  # fmt: skip
def test_fractions_that_do_not_fit_are_refused(options, parts):
    refused(tiny("timm vit"), OptionError, *parts, **options)
    refused(tiny("hf vit"), OptionError, *parts, **options)


def test_only_one_method_can_leave_heads_out():
    model = tiny("timm vit")
    before = snapshot(model)
    with pytest.raises(OptionError, match=r"both prune heads.*heads=1\.0"):
        tokenprune.patch(model, [SpAtten(heads=0.8), SpAtten(heads=0.7)])
    assert snapshot(model) == before
