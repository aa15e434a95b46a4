"""Heads that left are not computed: projections and attention of kept heads alone, against zeros before the output
projection of the unpatched model, layer by layer and step by step."""

import copy
import functools
import gc
import io
import pickle
import weakref

import pytest
import torch
from families import batch, fresh, generate, implementations, tiny
from states import in_threads, logits, replica_of
from test_spatten import HeadSimulation, ragged_text, spatten, text_model
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tokenprune
from tokenprune.decode.heads import Heads
from tokenprune.decode.sliced_linear import SlicedLinear

HEADS = (1.0, 0.75, 0.5, 0.25)
PROMPT = {"input_ids": torch.arange(2, 26)[None], "attention_mask": torch.ones(1, 24, dtype=torch.long)}


class WholeLinear(nn.Linear):
    """What a quantized layer is to us: not a plain one."""


def patched(model, **options):
    return tokenprune.patch(model, spatten(**{"tokens": 1.0, "heads": HEADS, **options}))


def attentions(model):
    return [layer.self_attn for layer in model.get_decoder().layers]


def made_whole(model):
    """`model` with output projections that are left whole."""
    for attention in attentions(model):
        attention.o_proj.__class__ = WholeLinear
    return model


def widths(model, monkeypatch, run):
    """What `run` gives, and in order the shapes of the weights that are no parameters of the model."""
    seen, real = [], functional.linear
    whole = {id(parameter) for parameter in model.parameters()}

    def linear(x, weight, bias=None):
        if id(weight) not in whole:
            seen.append(tuple(weight.shape))
        return real(x, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "linear", linear)
        return run(), seen


def zeroed_prompt(model, inputs, kept):
    """Logits of a prompt in one row by the rule, on the unpatched model: heads by what the layers before gave."""
    state = {"scores": None, "alive": None}

    def hook(module, args, layer):
        heads = args[0].unflatten(-1, (-1, attentions(model)[layer].head_dim))
        total = heads.shape[2]
        n_keep = max(1, int(total * kept[layer] + 1e-6))
        if n_keep < total:
            among = state["alive"] or range(total)
            order = sorted(among, key=lambda i: (-state["scores"][i].item(), i))
            state["alive"] = sorted(order[:n_keep])
            mask = torch.zeros(total)
            mask[state["alive"]] = 1
            heads = heads * mask[:, None]
        magnitude = heads[0].abs().sum((0, 2))
        state["scores"] = magnitude if state["scores"] is None else state["scores"] + magnitude
        return (heads.flatten(2),)

    handles = [
        one.o_proj.register_forward_pre_hook(lambda module, args, i=i: hook(module, args, i))
        for i, one in enumerate(attentions(model))
    ]
    with torch.no_grad():
        logits = model(**fresh(inputs)).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_a_prompt_with_images_projects_kept_heads_only(family, monkeypatch):
    dense = tiny(family, implementations(family)[0])
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, tokenprune.SpAtten(tokens=1.0, heads=HEADS))
    assert session.remarks == ()
    inputs = batch(family, ((5, (3, 4), 6),)).inputs
    with torch.no_grad():
        out, seen = widths(model, monkeypatch, lambda: model(**fresh(inputs)).logits)
    torch.testing.assert_close(out, zeroed_prompt(dense, inputs, HEADS), atol=1e-4, rtol=1e-4)
    first = attentions(dense)[0]
    total, width = first.q_proj.out_features // first.head_dim, first.head_dim
    hidden = first.q_proj.in_features
    kept = [n * width for share in HEADS if (n := max(1, int(total * share))) < total]
    assert {(n, hidden) for n in kept} <= set(seen)
    assert {(hidden, n) for n in kept} <= set(seen)
    ragged = batch(family)
    with torch.no_grad():
        out = model(**fresh(ragged.inputs)).logits
    for row, parts in enumerate(ragged.rows):
        wanted = zeroed_prompt(dense, batch(family, (parts,), seeds=(row,)).inputs, HEADS)[0, -1]
        torch.testing.assert_close(out[row, -1], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_single_row_is_what_zeros_give_in_prompt_and_steps(implementation, bias, monkeypatch):
    dense = text_model("llama", implementation)
    if bias:
        for one in attentions(dense):
            one.q_proj.bias = nn.Parameter(torch.randn(32))
            one.o_proj.bias = nn.Parameter(torch.randn(32))
    model = copy.deepcopy(dense)
    patched(model)
    out, seen = widths(model, monkeypatch, lambda: generate(model, PROMPT, 6, suppress_tokens=None))
    simulation = HeadSimulation(dense, PROMPT["input_ids"][0], HEADS)
    wanted = simulation.logits[-1]
    for step, token in enumerate(out.sequences[0, -6:].tolist()):
        torch.testing.assert_close(out.logits[step][0], wanted, atol=1e-4, rtol=1e-4)
        wanted = simulation.step(token)
    prompt = [(24, 32), (32, 24), (16, 32), (32, 16), (8, 32), (32, 8)]
    assert seen[:6] == prompt
    assert len(seen) > 6  # some of the steps too
    assert set(seen) == set(prompt)


def test_rows_that_differ_give_what_zeros_give_and_rows_that_agree_what_differing_ones_do():
    dense = text_model("llama")
    rows, inputs = ragged_text()
    model = copy.deepcopy(dense)
    patched(model)
    out = generate(model, inputs, 2, suppress_tokens=None)
    for row, prompt in enumerate(rows):
        simulation = HeadSimulation(dense, prompt, HEADS)
        torch.testing.assert_close(out.logits[0][row], simulation.logits[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_are_chosen_alike_whether_projections_are_sliced_or_whole(rows):
    dense = text_model("llama")
    _, ragged = ragged_text()
    inputs = PROMPT if rows == 1 else ragged
    options = {"tokens": (1.0, 0.8, 0.6, 0.4), "heads": HEADS}
    sliced, whole = copy.deepcopy(dense), made_whole(copy.deepcopy(dense))
    sessions = patched(sliced, **options), patched(whole, **options)
    outs = [generate(model, inputs, 4, suppress_tokens=None) for model in (sliced, whole)]
    for one, other in zip(outs[0].logits, outs[1].logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for one, other in zip(sessions[0].traces, sessions[1].traces, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.kept_indices, other.kept_indices, strict=True))


def test_what_is_no_plain_linear_layer_is_left_whole_and_the_report_says_so():
    session = patched(made_whole(text_model("llama")))
    assert [type(one.q_proj) for one in attentions(session.model)] == [nn.Linear] * 4
    assert session.remarks == (
        "Layers 1, 2, 3 project all heads, because o_proj is a WholeLinear; pruned ones are zeroed, not skipped.",
    )
    assert "because o_proj is a WholeLinear" in " ".join(str(session.report()).split())
    fused = patched(text_model("gpt2"))
    assert "GPT2Attention has no q_proj of its own" in fused.remarks[0]


@pytest.mark.parametrize("while_patched", [False, True])
def test_hooks_on_a_projection_see_everything(while_patched):
    dense = text_model("llama")
    model, seen = copy.deepcopy(dense), []

    def watch():
        attentions(model)[1].o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))

    if not while_patched:
        watch()
    session = patched(model)
    if while_patched:
        watch()
    else:
        assert session.remarks[0].startswith("Layers 1 project all heads, because o_proj has hooks")
    with torch.no_grad():
        out = model(**PROMPT).logits
    torch.testing.assert_close(out, zeroed_prompt(dense, PROMPT, HEADS), atol=1e-4, rtol=1e-4)
    assert seen == [32]


def test_parameters_stay_where_they_are_and_unpatching_restores_the_very_modules():
    model = text_model("llama")
    before, modules = dict(model.state_dict()), dict(model.named_modules())
    parameters = dict(model.named_parameters())
    patched(model)
    assert isinstance(attentions(model)[1].q_proj, SlicedLinear)
    assert type(attentions(model)[0].q_proj) is nn.Linear
    generate(model, PROMPT, 3, suppress_tokens=None)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert [(name, id(one)) for name, one in model.named_parameters()] == [(k, id(v)) for k, v in parameters.items()]
    slices = [weakref.ref(one.q_proj._slice[1][0]) for one in attentions(model)[1:]]
    model.double()
    model.train()
    tokenprune.unpatch(model)
    gc.collect()
    assert all(one() is None for one in slices)
    assert all(one is modules[name] for name, one in model.named_modules())
    assert {one.dtype for one in model.parameters()} == {torch.float64}
    assert all(one.training for one in model.modules())


def test_patching_again_does_not_pile_up():
    model = text_model("llama")
    original = attentions(model)[1].q_proj
    patched(model)
    session = patched(model)
    assert session.remarks == ()
    assert attentions(model)[1].q_proj.original is original
    tokenprune.unpatch(model)
    assert attentions(model)[1].q_proj is original


class Adapter(nn.Module):
    """What is put around a projection to train beside it; a hidden one is not found among the submodules."""

    def __init__(self, base, *, hidden=False):
        super().__init__()
        self.base = [base] if hidden else base
        self.added = nn.Linear(32, 32)

    def forward(self, x):
        base = self.base[0] if isinstance(self.base, list) else self.base
        return base(x) + self.added(x)


@pytest.mark.parametrize("hidden", [False, True])
def test_what_others_put_around_a_projection_stays_when_the_patch_goes(hidden):
    model = text_model("llama")
    patched(model)
    attention = attentions(model)[3]
    original = attention.q_proj.original
    attention.q_proj = adapter = Adapter(attention.q_proj, hidden=hidden)
    wrapped = text_model("llama")
    attentions(wrapped)[3].q_proj = Adapter(attentions(wrapped)[3].q_proj)
    attentions(wrapped)[3].q_proj.load_state_dict(adapter.state_dict(), strict=not hidden)
    wanted = logits(wrapped, PROMPT)
    assert not torch.equal(logits(model, PROMPT), wanted)
    tokenprune.unpatch(model)
    assert attention.q_proj is adapter
    assert hidden or adapter.base is original
    assert torch.equal(logits(model, PROMPT), wanted)
    for _ in range(2):
        session = patched(model)
        assert (attention.q_proj, type(attention.o_proj)) == (adapter, nn.Linear)
        assert session.remarks[0].startswith("Layers 3 project all heads, because q_proj is a Adapter")
        torch.testing.assert_close(logits(model, PROMPT), zeroed_prompt(wrapped, PROMPT, HEADS), atol=1e-4, rtol=1e-4)
    tokenprune.unpatch(model)
    assert attention.q_proj is adapter
    assert torch.equal(logits(model, PROMPT), wanted)


def test_what_others_put_in_the_place_of_a_projection_stays_when_the_patch_goes():
    model, other = text_model("llama"), nn.Linear(32, 32)
    patched(model)
    attentions(model)[3].q_proj = other
    tokenprune.unpatch(model)
    assert attentions(model)[3].q_proj is other
    assert type(attentions(model)[3].o_proj) is nn.Linear


@pytest.mark.filterwarnings("ignore:this .* is a copy of a patched one")
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_have_plain_linear_layers_and_are_unpatched(how):
    dense = text_model("llama")
    model = copy.deepcopy(dense)
    patched(model)
    generate(model, PROMPT, 2, suppress_tokens=None)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert {type(one.q_proj) for one in attentions(copied)} == {nn.Linear}
    assert attentions(copied)[1].q_proj.weight is not attentions(model)[1].q_proj.weight
    with torch.no_grad():
        assert torch.equal(copied(**PROMPT).logits, dense(**PROMPT).logits)
        assert not torch.equal(model(**PROMPT).logits, dense(**PROMPT).logits)


def test_two_threads_and_repeated_runs_give_the_same_bits():
    model = text_model("llama")
    patched(model)
    other = {"input_ids": PROMPT["input_ids"].flip(1), "attention_mask": PROMPT["attention_mask"]}
    wanted = [generate(model, inputs, 6, suppress_tokens=None) for inputs in (PROMPT, other)]
    found = in_threads(*(lambda x=x: generate(model, x, 6, suppress_tokens=None) for x in (PROMPT, other)))
    for one, two in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.logits, two.logits, strict=True))


def test_replicas_of_data_parallel_prune_as_the_model_does():
    model = text_model("llama")
    patched(model)
    wanted = logits(model, PROMPT)
    (found,) = in_threads(lambda: logits(replica_of(model), PROMPT))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert type(attentions(replica_of(model))[1].q_proj) is nn.Linear
    assert type(attentions(model)[1].q_proj) is SlicedLinear


def test_weights_that_change_while_patched_are_used():
    dense = text_model("llama")
    model = copy.deepcopy(dense)
    patched(model)
    generate(model, PROMPT, 3, suppress_tokens=None)
    for changed in (dense, model):
        for one in attentions(changed):
            one.q_proj.weight.data.mul_(-0.5)
            one.o_proj.weight.data = one.o_proj.weight.data * 2
    with torch.no_grad():
        found = model(**PROMPT).logits
    torch.testing.assert_close(found, zeroed_prompt(dense, PROMPT, HEADS), atol=1e-4, rtol=1e-4)


def test_weights_changed_behind_torchs_back_are_used_by_the_next_generation_from_a_few_tokens():
    models = [text_model("llama") for _ in range(2)]
    patched(models[0])
    few = {"input_ids": PROMPT["input_ids"][:, :6]}
    generate(models[0], few, 6, suppress_tokens=None)
    for model in models:
        for one in attentions(model):
            one.q_proj.weight.data.mul_(1.5)
            one.o_proj.weight.data.mul_(0.5)
    patched(models[1])
    found, wanted = (generate(model, few, 6, suppress_tokens=None).logits for model in models)
    assert attentions(models[0])[3].q_proj._slice is not None
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_gradients_reach_the_whole_weights():
    model = text_model("llama")
    patched(model)
    model(**PROMPT).logits.sum().backward()
    for one in attentions(model)[1:]:
        assert one.q_proj.weight.grad.shape == one.o_proj.weight.grad.shape == (32, 32)
        assert (one.q_proj.weight.grad == 0).all(1).any()
    assert all(one.q_proj._slice is None for one in attentions(model)[1:])


def test_gradient_checkpointing_is_refused_before_the_patch_and_in_training_after_it():
    model = text_model("llama")

    def checkpointing(on):
        for module in model.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = on
                module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    checkpointing(True)
    with pytest.raises(tokenprune.UnsupportedModelError, match=r"model\.gradient_checkpointing_disable\(\)"):
        patched(model)
    patched(model, tokens=(1.0, 0.8, 0.6, 0.4), heads=1.0)
    checkpointing(False)
    session = patched(model)
    model.train()
    checkpointing(True)
    with pytest.raises(tokenprune.UnsupportedModelError, match="checkpointing"):
        model(**PROMPT, use_cache=False)
    with session.pause():
        model(**PROMPT, use_cache=False)
    with torch.no_grad():
        model(**PROMPT, use_cache=False)
    model.eval()
    model(**PROMPT).logits.sum().backward()


def test_keeping_all_heads_swaps_nothing_and_changes_no_bit():
    model = text_model("llama")
    with torch.no_grad():
        wanted = model(**PROMPT).logits
        patched(model, heads=1.0)
        assert {type(one.q_proj) for one in attentions(model)} == {nn.Linear}
        assert torch.equal(model(**PROMPT).logits, wanted)


def test_a_paused_session_projects_everything():
    dense = text_model("llama")
    model = copy.deepcopy(dense)
    session = patched(model)
    with torch.no_grad(), session.pause():
        assert torch.equal(model(**PROMPT).logits, dense(**PROMPT).logits)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[0, 1, 4, 5]], [0, 2]),  # two groups of two whole, one without any
        ([[0, 2, 5]], [0, 1, 2]),  # one head of each group: the keys as they are
        ([[0, 1, 2]], [0, 0, 1]),  # groups that differ: a key for each head
        ([[0, 1, 2], [3, 4, 5]], None),
    ],
)
def test_keys_go_to_the_heads_that_they_served(rows, wanted):
    index = torch.tensor(rows)
    heads = Heads(index, 6)
    key = torch.randn(len(rows), 3, 7, 2)
    (found,) = heads.serving(key)
    full = key.repeat_interleave(2, dim=1)
    for row, chosen in enumerate(rows):
        repeated = found[row].repeat_interleave(len(chosen) // found.shape[1], dim=0)
        assert torch.equal(repeated, full[row, chosen])
    if wanted is not None:
        assert torch.equal(found, key[:, wanted])
        assert (found is key) == (wanted == [0, 1, 2])
    query = torch.randn(len(rows), 6, 4, 2)
    assert torch.equal(heads.take(heads.widen(heads.take(query))), heads.take(query))
    assert torch.equal(heads.widen(heads.take(query)), query * heads.mask[:, :, None, None])
