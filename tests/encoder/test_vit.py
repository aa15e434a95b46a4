"""Vision encoders: ToMe against the paper written out (`vits.py`), halves of blocks, and the laws of state."""

import copy
import gc
import pickle
import threading
from typing import Any, ClassVar

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from states import hook_counts, snapshot
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vits import (
    AT_END,
    DEPTH,
    NAMES,
    PREFIX,
    answer,
    attend,
    blocks_of,
    inputs,
    merged,
    plain_blocks,
    run,
    tiny,
)

import tokenprune
from tokenprune import DivPrune, InputError, Method, OptionError, ToMe, UnsupportedModelError, running
from tokenprune.encoder import run_state
from tokenprune.encoder.adapter import find_encoder
from tokenprune.encoder.block_check import block_of
from tokenprune.reduction import Keep, Merge
from tokenprune.schedule import count, removals, removals_for

HALVED = tuple(name for name in NAMES if name not in AT_END)
SCHEDULES = {16: 3, 9: [2, 0, 3, 1]}


class Watch:
    """What every block got and returned in the last forward, seen by hooks that stand behind those of the library."""

    def __init__(self, model: nn.Module) -> None:
        self.got: dict[int, Tensor] = {}
        self.gave: dict[int, Tensor] = {}
        for number, block in enumerate(blocks_of(model)):
            block.register_forward_hook(lambda module, args, output, at=number: self._note(at, args, output))

    def _note(self, number: int, args: Any, output: Any) -> None:
        self.got[number], self.gave[number] = args[0], output[0] if isinstance(output, tuple) else output


def removed(r: Any, n_patches: int) -> list[int]:
    found = []
    for one in r if isinstance(r, list) else [r] * DEPTH:
        found.append(min(one, n_patches // 2))
        n_patches -= found[-1]
    return found


@pytest.mark.parametrize("n_patches", [16, 9])
@pytest.mark.parametrize("name", HALVED)
def test_tome_is_the_paper_written_out(name, n_patches):
    model, given, r = tiny(name, n_patches), inputs(name, n_patches), SCHEDULES[n_patches]
    session = tokenprune.patch(model, "tome", r=r)
    watch = Watch(model)
    run(model, given)
    rows = merged(name, model, given, watch.got[0], removed(r, n_patches))
    prefix = PREFIX.get(name, 1)
    for layer in range(DEPTH):
        wanted = torch.stack([row[layer].spread() for row in rows])
        assert watch.gave[layer].shape == wanted.shape
        assert (watch.gave[layer] - wanted).abs().max() <= 1e-5 * max(1, float(wanted.abs().max()))
        trace = session.traces[layer]
        if not removed(r, n_patches)[layer]:
            assert trace.status == "skipped"
            continue
        assert trace.place == "between attention and MLP"
        assert trace.n_out == tuple(len(row[layer].x) - prefix for row in rows)
        for found, row in zip(trace.assignment, rows, strict=True):
            groups = [{i for i in range(n_patches) if found[i] == group} for group in range(trace.n_out[0])]
            assert groups == [{i - prefix for i in group} for group in row[layer].in_place().groups[prefix:]]


@pytest.mark.parametrize("method", [tokenprune.ToMe(r=3), tokenprune.SpAtten(tokens=0.6)], ids=["tome", "spatten"])
@pytest.mark.parametrize("name", HALVED)
def test_unfused_attention_gives_the_same(name, method):
    model, given = tiny(name), inputs(name)
    tokenprune.patch(model, method)
    wanted = answer(run(model, given))
    if name.startswith("hf"):
        model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    tokenprune.patch(model, method)
    assert torch.allclose(answer(run(model, given)), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["timm vit", "timm eva02", "hf clip"])
def test_without_proportional_attention_sizes_only_weigh_the_means(name):
    model, given = tiny(name), inputs(name)
    tokenprune.patch(model, "tome", r=3, proportional=False)
    watch = Watch(model)
    run(model, given)
    for found, row in zip(watch.gave[DEPTH - 1], merged(name, model, given, watch.got[0], [3] * 4, False), strict=True):
        assert (found - row[-1].spread()).abs().max() <= 1e-5 * max(1, float(found.abs().max()))


@pytest.mark.parametrize("name", AT_END)
def test_blocks_without_halves_merge_at_their_end(name):
    model, given = tiny(name), inputs(name)
    session = tokenprune.patch(model, "tome", r=3)
    watch = Watch(model)
    run(model, given)
    assert {trace.place for trace in session.traces} == {"at the end of the block"}
    assert session.traces[-1].n_out == (4, 4)
    for at, rows in enumerate(merged(name, tiny(name), given, watch.got[0], [3] * DEPTH)):
        for number, row in enumerate(rows):
            wanted = row.spread()
            assert (watch.gave[number][at] - wanted).abs().max() <= 1e-4 * max(1, float(wanted.abs().max()))


# --- halves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_block_in_halves_gives_what_it_gives_at_once_or_is_found_not_to(name):
    model = tiny(name)
    before = snapshot(model)
    adapter = find_encoder(model)
    assert adapter is not None
    for number, module in enumerate(blocks_of(model)):
        block = block_of(adapter.tower, adapter.host, number, module, proportional=True)
        assert (block.middle is not None) == (name in HALVED)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_nothing_removed_is_bit_identical_also_through_the_merging_code(name):
    model, given = tiny(name), inputs(name)
    wanted = answer(run(model, given))
    for options in ({"r": 0}, {"keep": 1.0}):
        session = tokenprune.patch(model, "tome", **options)
        assert torch.equal(answer(run(model, given)), wanted)
        session.forced = True
        assert torch.equal(answer(run(model, given)), wanted)
        assert [trace.status for trace in session.traces] == ["applied"] * DEPTH
    assert {trace.n_out for trace in session.traces} == {(16, 16)}


@pytest.mark.parametrize("name", NAMES)
def test_merging_is_engaged_and_a_row_does_not_depend_on_those_beside_it(name):
    model, given = tiny(name), inputs(name, n_rows=3)
    dense = answer(run(model, given))
    session = tokenprune.patch(model, "tome", keep=0.5)
    found = answer(run(model, given))
    assert session.traces[-1].n_out == (8, 8, 8)
    assert (found - dense).abs().max() > 1e-4
    together = session.traces[-1].assignment
    for row in range(3):
        alone = answer(run(model, {key: value[row : row + 1] for key, value in given.items()}))
        assert torch.allclose(alone[0], found[row], atol=1e-5, rtol=1e-5)
        assert torch.equal(session.traces[-1].assignment[0], together[row])


# --- what callers get -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("timm")])
def test_features_and_intermediates_keep_their_shape_and_agree_with_the_forward(name):
    model, x = tiny(name), inputs(name)["x"]
    prefix = PREFIX.get(name, 1)
    tokenprune.patch(model, "tome", r=3)
    watch = Watch(model)
    with torch.no_grad():
        wanted = model(x)
        features = model.forward_features(x)
        assert torch.allclose(model.forward_head(features), wanted, atol=1e-5)
        assert features.shape[1] == 16 + prefix
        last, maps = model.forward_intermediates(x, norm=False)
        assert torch.equal(last, features)
        for number, found in enumerate(maps):
            tokens = watch.gave[number][:, prefix:]
            assert torch.equal(found, tokens.transpose(1, 2).reshape(found.shape))
        (early,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(early, maps[1])
        assert torch.equal(model(x), wanted)


def test_features_only_wrappers_of_timm_get_grids():
    model = timm.create_model("test_vit", features_only=True, img_size=64).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shapes = [found.shape for found in model(x)]
        session = tokenprune.patch(model, "tome", r=1)
        assert [found.shape for found in model(x)] == shapes
    assert session.traces[-1].n_out[0] < 16


@pytest.mark.parametrize("captured_before", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("hf")])
def test_hidden_states_keep_their_shape(name, captured_before):
    model, given = tiny(name), inputs(name)
    if captured_before:
        run(model, given, output_hidden_states=True)
    dense = run(copy.deepcopy(model), given, output_hidden_states=True).hidden_states
    wanted_plain = None
    session = tokenprune.patch(model, "tome", r=3)
    wanted_plain = answer(run(model, given))
    watch = Watch(model)
    output = run(model, given, output_hidden_states=True)
    assert torch.allclose(answer(output), wanted_plain, atol=1e-6)
    assert [state.shape for state in output.hidden_states] == [state.shape for state in dense]
    assert torch.equal(output.hidden_states[0], dense[0])
    for number in range(DEPTH - 1):
        assert torch.equal(output.hidden_states[number + 1], watch.gave[number])
    assert session.traces[-1].n_out == (4, 4)


def test_attentions_are_captured_once_a_block_at_the_length_that_the_block_saw():
    model, given = tiny("hf vit"), inputs("hf vit")
    model.set_attn_implementation("eager")
    tokenprune.patch(model, "tome", r=3)
    attentions = run(model, given, output_attentions=True).attentions
    assert [found.shape[-2:] for found in attentions] == [(n, n) for n in (17, 14, 11, 8)]


@pytest.mark.parametrize("cls", ["Dinov2Backbone", "Dinov2WithRegistersBackbone", "DINOv3ViTBackbone"])
def test_backbones_give_grids(cls):
    kind = getattr(transformers, cls)
    config = kind.config_class(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, mlp_ratio=2, intermediate_size=40, patch_size=8,
        image_size=32, out_features=["stage2", "stage4"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = kind(config).eval()
    shapes = [found.shape for found in run(model, inputs("hf dinov2")).feature_maps]
    session = tokenprune.patch(model, "tome", r=3)
    found = run(model, inputs("hf dinov2")).feature_maps
    assert [one.shape for one in found] == shapes == [(2, 24, 4, 4)] * 2
    assert session.traces[-1].n_out == (4, 4)
    assert len({tuple(pixel.tolist()) for pixel in found[-1][0].flatten(1).T}) == 4


def test_averages_count_patches_and_not_tokens():
    model, given = tiny("timm average"), inputs("timm average")
    tokenprune.patch(model, "tome", r=3)
    watch = Watch(model)
    found = run(model, given)
    for row, wanted in zip(merged("timm average", model, given, watch.got[0], [3] * 4), found, strict=True):
        weights = torch.tensor(row[-1].sizes)
        mean = (model.norm(row[-1].x) * weights[:, None]).sum(0) / weights.sum()
        assert torch.allclose(model.head(model.fc_norm(mean)), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["timm vit", "timm eva02", "hf vit", "hf siglip"])
def test_without_restoring_the_merged_tokens_are_handed_on(name):
    model, given = tiny(name), inputs(name)
    whole = ToMe(r=3)
    tokenprune.patch(model, whole)
    wanted = run(model, given)
    session = tokenprune.patch(model, ToMe(r=3, restore=False))
    watch = Watch(model)
    found = run(model, given)
    n_left = 4 + PREFIX.get(name, 1)
    assert watch.gave[DEPTH - 1].shape[1] == n_left
    assert session.traces[-1].n_out == (4, 4)
    if name in ("timm vit", "hf vit"):
        assert torch.allclose(answer(found), answer(wanted), atol=1e-5)
    if name == "timm vit":
        assert model.forward_features(**given).shape[1] == n_left


def test_a_mask_that_hides_tokens_is_respected_and_said_so():
    model, given = tiny("hf siglip2"), inputs("hf siglip2")
    given["pixel_attention_mask"][0, -3:] = 0
    wanted = answer(run(model, given))
    session = tokenprune.patch(model, "tome", r=3)
    assert torch.equal(answer(run(model, given)), wanted)
    (trace,) = session.traces
    assert (trace.status, "mask hides tokens" in trace.reason) == ("skipped", True)


def test_images_of_another_size_get_a_schedule_of_their_own():
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=5, dynamic_img_size=True
    ).eval()
    session = tokenprune.patch(model, "tome", keep=0.5)
    for height, width in ((32, 32), (24, 40), (8, 8), (64, 32)):
        run(model, {"x": torch.zeros(1, 3, height, width)})
        n_patches = height * width // 64
        assert session.traces[0].n_in == (n_patches,)
        assert session.traces[-1].n_out == (count(0.5, n_patches),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_go_through(dtype):
    for name in ("timm eva02", "hf dinov3"):
        model, given = tiny(name).to(dtype), inputs(name)
        given = {key: value.to(dtype) for key, value in given.items()}
        session = tokenprune.patch(model, "tome", r=3)
        assert answer(run(model, given)).isfinite().all()
        assert session.traces[-1].n_out == (4, 4)
        assert {trace.place for trace in session.traces} == {"between attention and MLP"}


def test_gradients_reach_every_weight_as_in_the_dense_model():
    model, given = tiny("timm deit3"), inputs("timm deit3")
    tokenprune.patch(model.train(), "tome", r=3)
    model(**given).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0 or "qkv.bias" in name


# --- the laws of state ----------------------------------------------------------------------------


def untouched() -> bool:
    """Whether no forward has left anything in this context."""
    return running.innermost() is None


@pytest.mark.parametrize("name", NAMES)
def test_unpatching_leaves_the_encoder_as_it_was(name):
    model, given = tiny(name), inputs(name)
    wanted = answer(run(model, given))
    before, hooks = snapshot(model), hook_counts(model)
    session = tokenprune.patch(model, "tome", r=3)
    first = answer(run(model, given))
    tokenprune.patch(model, "tome", r=1)
    assert not session.installed
    with tokenprune.patch(model, "tome", r=3) as session:
        assert torch.equal(answer(run(model, given)), first)
        with session.pause():
            assert torch.equal(answer(run(model, given)), wanted)
    assert (snapshot(model), hook_counts(model)) == (before, hooks)
    assert torch.equal(answer(run(model, given)), wanted)
    assert untouched()


@pytest.mark.filterwarnings("ignore:this .* is a copy of a patched one")
@pytest.mark.parametrize("name", ["timm vit", "timm eva02", "hf clip"])
def test_copies_of_a_patched_encoder_are_not_patched(name):
    model, given = tiny(name), inputs(name)
    wanted = answer(run(model, given))
    tokenprune.patch(model, "tome", r=3)
    merged_answer = answer(run(model, given))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(run(copied, given)), wanted)
        session = tokenprune.patch(copied, "tome", r=2)
        run(copied, given)
        assert session.traces[-1].n_out == (8, 8)
    assert torch.equal(answer(run(model, given)), merged_answer)
    assert list(model.state_dict()) == list(tiny(name).state_dict())


class Broken(RuntimeError):
    """Raised by a hook of a test."""


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("where", ["before", "attention", "mlp", "behind"])
def test_an_exception_leaves_nothing_behind(where, direct):
    model, x = tiny("timm vit"), inputs("timm vit")["x"]
    call = model.forward_features if direct else model
    tokenprune.patch(model, "tome", r=3)
    with torch.no_grad():
        wanted = call(x)
        block = model.blocks[2]

        def raise_it(*args: Any) -> None:
            raise Broken

        hook = {
            "before": lambda: block.register_forward_pre_hook(raise_it),
            "attention": lambda: block.attn.register_forward_pre_hook(raise_it),
            "mlp": lambda: block.mlp.register_forward_hook(raise_it),
            "behind": lambda: block.register_forward_hook(raise_it),
        }[where]()
        with pytest.raises(Broken):
            call(x)
        state = running.innermost()
        assert state is None or (state.direct and held(state) <= 2)
        hook.remove()
        assert torch.equal(call(x), wanted)
    assert untouched()


def held(run: run_state.RunState) -> int:
    """Most axes of a tensor that a pass holds: hidden states, keys and queries have three or four."""
    values = [*vars(run).values(), *run.seen.values()]
    return max((value.ndim for value in values if isinstance(value, torch.Tensor)), default=0)


def test_stopping_early_holds_no_states_and_ends_where_another_block_is_called():
    model, x = tiny("timm vit"), inputs("timm vit")["x"]
    tokenprune.patch(model, "tome", r=3)
    with torch.no_grad():
        (found,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        del found
        gc.collect()
        assert held(running.innermost()) <= 2
        assert model.blocks[3](x.new_ones(1, 17, 24)).shape == (1, 17, 24)
        assert untouched()
        model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        model(x)
    assert untouched()


@pytest.mark.parametrize("name", ["timm vit", "hf clip"])
@pytest.mark.parametrize("method", ["tome", "spatten"])
def test_hooks_of_others_may_replace_what_a_block_returns(name, method):
    model, given = tiny(name), inputs(name)
    options = {"r": 3} if method == "tome" else {"tokens": 0.6, "heads": (1.0, 0.5, 0.5, 0.5)}
    tokenprune.patch(model, method, **options)
    wanted = answer(run(model, given))

    def replace(module: Any, args: Any, output: Any) -> Any:
        gc.collect()
        return (output[0] * 1.0, *output[1:]) if isinstance(output, tuple) else output * 1.0

    for block in blocks_of(model):
        block.register_forward_hook(replace)
    assert torch.equal(answer(run(model, given)), wanted)


def test_an_encoder_that_changed_after_patching_is_refused():
    model, x = tiny("timm vit"), inputs("timm vit")["x"]
    tokenprune.patch(model, "tome", r=3)
    model.set_grad_checkpointing()
    with pytest.raises(tokenprune.InputError, match="checkpointing"):
        model(x)
    model.set_grad_checkpointing(False)
    model.prune_intermediate_layers([1])
    with pytest.raises(tokenprune.InputError, match="patch again"):
        model(x)
    assert untouched()


def test_a_block_by_itself_and_part_of_a_model_run_dense():
    model, x = tiny("timm vit"), inputs("timm vit")["x"]
    tokens = torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.blocks[2](tokens)
        tokenprune.patch(model, "tome", r=3)
        model(x)
        assert torch.equal(model.blocks[2](tokens), wanted)


def test_threads_and_two_models_at_once_do_not_meet():
    models = [tiny("timm vit"), tiny("hf clip")]
    given = [inputs("timm vit"), inputs("hf clip")]
    for model, r in zip(models, (3, 2), strict=True):
        tokenprune.patch(model, "tome", r=r)
    wanted = [answer(run(*pair)) for pair in zip(models, given, strict=True)]
    found: list[list[bool]] = [[], [], [], []]

    def work(number: int) -> None:
        for _ in range(5):
            output = answer(run(models[number % 2], given[number % 2]))
            found[number].append(torch.allclose(output, wanted[number % 2], atol=1e-6))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[True] * 5] * 4


def test_an_encoder_inside_another_forward_of_an_encoder_keeps_its_own_state():
    outer, inner, x = tiny("timm vit"), tiny("timm deit3"), inputs("timm vit")["x"]
    sessions = [tokenprune.patch(outer, "tome", r=3), tokenprune.patch(inner, "tome", r=2)]
    wanted = run(outer, {"x": x}), run(inner, {"x": x})
    seen = []
    outer.blocks[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(inner(x)))
    assert torch.equal(run(outer, {"x": x}), wanted[0])
    assert all(torch.allclose(one, wanted[1], atol=1e-6) for one in seen)
    assert [session.traces[-1].n_out for session in sessions] == [(4, 4), (8, 8)]


def test_patched_then_compiled_gives_the_same():
    model, given = tiny("timm vit"), inputs("timm vit")
    tokenprune.patch(model, "tome", r=3)
    wanted = run(model, given)
    assert torch.allclose(run(torch.compile(model, backend="eager"), given), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["timm eva02", "hf clip", "hf dinov3"])
def test_weights_that_accelerate_brings_in_are_no_hindrance(name):
    accelerate = pytest.importorskip("accelerate")
    model, given = tiny(name), inputs(name)
    tokenprune.patch(model, "tome", r=3)
    wanted = answer(run(model, given))
    tokenprune.unpatch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    session = tokenprune.patch(model, "tome", r=3)
    assert torch.allclose(answer(run(model, given)), wanted, atol=1e-6)
    assert {trace.place for trace in session.traces} == {"between attention and MLP"}


# --- schedules ------------------------------------------------------------------------------------


def test_schedules_follow_their_definitions():
    assert removals(13, n_layers=12, n_tokens=196) == (13,) * 12
    assert removals((8, -1.0), n_layers=12, n_tokens=196) == (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)
    assert removals((8, 1.0), n_layers=12, n_tokens=196)[::-1] == removals((8, -1.0), n_layers=12, n_tokens=196)
    assert removals((8, 0), n_layers=12, n_tokens=196) == (8,) * 12
    assert removals([5, 0, 7], n_layers=4, n_tokens=20) == (5, 0, 7, 0)
    assert removals(6, n_layers=3, n_tokens=20) == (6, 6, 4)  # at most half of the eight that are left
    assert removals(500, n_layers=10, n_tokens=196) == (98, 49, 24, 12, 6, 3, 2, 1, 0, 0)
    assert removals_for(0.5, n_layers=12, n_tokens=196) == (9, 9, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8)


@settings(deadline=None, max_examples=200, database=None)
@given(st.one_of(st.floats(0.01, 1.0), st.integers(1, 600)), st.integers(1, 24), st.integers(1, 600))
def test_a_keep_is_reached_exactly_or_refused(keep, n_layers, n_tokens):
    least = n_tokens
    for _ in range(n_layers):
        least -= least // 2
    if count(keep, n_tokens) < least:
        with pytest.raises(OptionError, match=f"leave {least}"):
            removals_for(keep, n_layers=n_layers, n_tokens=n_tokens)
        return
    left = n_tokens
    for r in removals_for(keep, n_layers=n_layers, n_tokens=n_tokens):
        assert 0 <= r <= left // 2
        left -= r
    assert left == count(keep, n_tokens)


# --- methods of others ----------------------------------------------------------------------------


class First(Method):
    """Keeps the first patches."""

    name: ClassVar[str] = "first"
    proportional: ClassVar[bool] = True

    def encoder_block(self, signals: Any, budget: Any) -> Any:
        return Keep(torch.arange(budget.high).expand(len(signals.keys), -1))


@pytest.mark.parametrize("name", HALVED)
def test_a_method_may_drop_tokens_instead(name):
    model, given = tiny(name), inputs(name)
    session = tokenprune.patch(model, First(keep=0.25))
    watch = Watch(model)
    run(model, given)
    assert session.traces[-1].n_out == (4, 4)
    prefix = PREFIX.get(name, 1)
    assert session.traces[-1].assignment[0].tolist() == [0, 1, 2] + [3] * 13
    with torch.no_grad():
        for row, tokens in zip(watch.gave[DEPTH - 1], watch.got[0], strict=True):
            for block, n_left in zip(plain_blocks(name, model, given), (13, 10, 7, 4), strict=True):
                places = list(range(len(tokens)))
                tokens = (tokens + attend(block, tokens, [1.0] * len(tokens), places, prefix)[0])[: prefix + n_left]
                tokens = tokens + block.mlp(block.norm2(tokens))
            assert torch.allclose(row[: prefix + 4], tokens, atol=1e-5, rtol=1e-5)


def test_methods_in_a_list_follow_each_other_in_every_block():
    model, given = tiny("timm vit"), inputs("timm vit")
    session = tokenprune.patch(model, [ToMe(r=2), First(keep=12)])
    run(model, given)
    assert [trace.method for trace in session.traces[:2]] == ["tome", "first"]
    assert session.traces[-1].n_out == (4, 4)


ANSWERS: dict[str, tuple[Any, str]] = {
    "nothing": (lambda n, m: None, "NoneType"),
    "too many": (lambda n, m: Keep(torch.arange(m + 1).expand(2, -1)), r"\[2, 15\]"),
    "no class token": (lambda n, m: Keep(torch.arange(1, m + 1).expand(2, -1)), "first 1 .class"),
    "descending": (lambda n, m: Keep(torch.arange(m).flip(0).expand(2, -1)), "ascending"),
    "gaps": (lambda n, m: Keep(torch.arange(m).expand(2, -1), torch.ones(2, m, dtype=torch.bool)), "gaps"),
    "short groups": (
        lambda n, m: Merge(torch.arange(m).expand(2, -1), torch.zeros(2, m, dtype=torch.int64)), "groups torch.int64"
    ),
    "into the class token": (
        lambda n, m: Merge(torch.arange(m).expand(2, -1), torch.arange(n).where(torch.arange(n) < m, 0).expand(2, -1)),
        "merge a class token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", ANSWERS)
def test_a_wrong_answer_of_a_method_is_refused(wrong):
    make, says = ANSWERS[wrong]

    class Wrong(First):
        def encoder_block(self, signals: Any, budget: Any) -> Any:
            return make(signals.keys.shape[1], budget.high)

    model, given = tiny("timm vit"), inputs("timm vit")
    tokenprune.patch(model, Wrong(keep=0.25))
    with pytest.raises(InputError, match=says):
        run(model, given)
    assert untouched()


# --- refusals -------------------------------------------------------------------------------------


def refused(model: nn.Module, error: type[Exception], *parts: str, method: Any = "tome", **options: Any) -> None:
    """`patch` raises `error` with all of `parts` and leaves `model` as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        tokenprune.patch(model, method, **options)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert snapshot(model) == before


@pytest.mark.parametrize(("options", "parts"), [
    ({}, ("r=8", "keep=0.5")),
    ({"r": 3, "keep": 0.5}, ("either r", "got r=3 and keep=0.5")),
    ({"r": -1}, ("at least 0", "got -1")),
    ({"r": 2.5}, ("int", "got 2.5")),
    ({"r": (3, 2.0)}, ("[-1, 1]", "got (3, 2.0)")),
    ({"r": (3, 0.5, 1)}, ("pair",)),
    ({"r": []}, ("list of ints",)),
    ({"r": [1, None]}, ("list of ints",)),
    ({"keep": 0.0}, ("(0, 1]",)),
    ({"r": 1, "proportional": 1}, ("proportional must be True or False",)),
    ({"r": 1, "backend": "cuda"}, ("'auto', 'torch' or 'triton'",)),
    ({"r": [1, 1, 1, 1, 1]}, ("names 5 blocks", "has 4")),
    ({"r": 1, "positions": "packed"}, ("positions", "original")),
    ({"keep": 1, "method": DivPrune(keep=0.5)}, ("DivPrune",)),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, parts):
    refused(tiny("timm vit"), OptionError, *parts, **options)


def test_methods_for_decoders_are_refused_by_name():
    refused(tiny("timm vit"), OptionError, "vision encoder", "before_llm", "tome", "spatten", method="divprune")
    refused(tiny("hf vit"), OptionError, "vision encoder", "divprune", method=[ToMe(r=1), DivPrune(keep=0.5)])


def test_so_few_as_cannot_be_reached_are_refused():
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    refused(model, OptionError, "leaves 1 of 16", "leave 4", keep=1)


ONE_BLOCK = {"embed_dim": 8, "depth": 1, "num_heads": 1}
ONE_A_STAGE = (1, 1, 1, 1)


@pytest.mark.parametrize(("name", "reason", "small"), [
    ("swin_tiny_patch4_window7_224", "windows", {"embed_dim": 8, "depths": ONE_A_STAGE, "num_heads": ONE_A_STAGE}),
    ("swinv2_tiny_window8_256", "windows", {"embed_dim": 8, "depths": ONE_A_STAGE, "num_heads": ONE_A_STAGE}),
    ("hiera_tiny_224", "stages", {"embed_dim": 8, "stages": ONE_A_STAGE, "num_heads": 1}),
    ("convnext_atto", "convolutional", {"dims": (8, 8, 8, 8), "depths": ONE_A_STAGE}),
    ("naflexvit_base_patch16_gap", "NaFlex", ONE_BLOCK),
    ("samvit_base_patch16", "windows", ONE_BLOCK | {"img_size": 64, "global_attn_indexes": ()}),
    ("vit_relpos_small_patch16_224", "relative positions", ONE_BLOCK),
    ("beit_base_patch16_224", "relative positions", ONE_BLOCK),
    ("vit_small_patch16_18x2_224", "VisionTransformer", ONE_BLOCK),
    ("resnet10t", "no text decoder", {}),
])  # fmt: skip
def test_encoders_of_timm_that_cannot_be_reduced_are_refused_with_the_reason(name, reason, small):
    model = timm.create_model(name, **small)
    refused(model, UnsupportedModelError, type(model).__name__, reason, r=1)


@pytest.mark.parametrize(("name", "reason"), [
    ("SwinModel", "windows"),
    ("Swinv2ForImageClassification", "windows"),
    ("HieraModel", "stages"),
    ("ConvNextModel", "convolutional"),
    ("BeitModel", "relative positions"),
])  # fmt: skip
def test_encoders_of_transformers_that_cannot_be_reduced_are_refused_with_the_reason(name, reason):
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class())
    refused(model, UnsupportedModelError, name, reason, "supported families are", r=1)


def test_gradient_checkpointing_is_refused_with_what_to_do():
    model = tiny("timm vit")
    model.set_grad_checkpointing(True)
    refused(model, UnsupportedModelError, "checkpointing", "set_grad_checkpointing(False)", r=1)
    model = tiny("hf vit")
    model.vit.layers[0].gradient_checkpointing = True
    refused(model, UnsupportedModelError, "checkpointing", "gradient_checkpointing_disable", r=1)


def test_attention_that_takes_no_sizes_is_refused_with_what_to_do():
    model = tiny("hf vit")
    model.config._attn_implementation = "flash_attention_2"
    refused(model, OptionError, "flash_attention_2", "proportional=False", r=1)


def test_two_encoders_at_once_are_refused_by_their_names():
    refused(nn.ModuleList([tiny("timm vit"), tiny("hf clip")]), UnsupportedModelError, "holds 2 vision encoders", r=1)


def test_a_compiled_encoder_is_refused():
    refused(torch.compile(tiny("timm vit"), backend="eager"), UnsupportedModelError, "patch first", r=1)


def test_encoders_are_among_the_families():
    assert {"timm_vit", "timm_eva", "timm_beit", "vit", "dinov3_vit"} <= set(tokenprune.list_families())
    assert "tome" in tokenprune.list_methods()
