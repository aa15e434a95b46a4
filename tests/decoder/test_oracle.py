"""O1, O2, O5, O7: pruned generation against an independent dense computation, over all families, in ragged padded
batches."""

import pytest
import torch
from families import EVEN, FAMILIES, MROPE, RAGGED, batch, generate, implementations, tiny, twins
from oracle import check_steps
from upstream import cache_of

import tokenprune

CASES = [(family, implementation) for family in FAMILIES for implementation in implementations(family)]
WINDOWS = {
    "mistral3": {"sliding_window": 9},
    "gemma3": {"sliding_window": 9},
    "aya_vision": {"sliding_window": 9},
    "paligemma2": {"sliding_window": 9},
}


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_pruned_generation_equals_a_dense_run_on_the_kept_tokens(family, implementation):
    dense, model = twins(family, implementation)
    session = tokenprune.patch(model, "divprune", keep=0.5)
    ragged = batch(family)
    out = generate(model, ragged.inputs, 4)
    assert session.traces[-1].n_out == (8, 6, 4)
    check_steps(dense, family, out, session.traces, ragged, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_alone_is_exact_too(family):
    dense, model = twins(family, implementations(family)[0])
    session = tokenprune.patch(model, "divprune", keep=3)
    single = batch(family, (RAGGED[0],))
    out = generate(model, single.inputs, 3)
    assert session.traces[-1].n_out == (6,)
    check_steps(dense, family, out, session.traces, single, 3)


@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows_go_on_counting_tokens_of_the_unpruned_sequence(family):
    implementation = implementations(family)[0]
    dense, model = twins(family, implementation, text_config=WINDOWS[family])
    session = tokenprune.patch(model, "divprune", keep=0.5)
    ragged = batch(family)
    out = generate(model, ragged.inputs, 6)
    check_steps(dense, family, out, session.traces, ragged, 6)


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_keeping_everything_is_bit_identical_also_through_the_gathering_code(family, implementation):
    dense, model = twins(family, implementation)
    ragged = batch(family)
    wanted = generate(dense, ragged.inputs, 3)
    session = tokenprune.patch(model, "divprune", keep=1.0)
    for forced in (False, True):
        session.forced = forced
        out = generate(model, ragged.inputs, 3)
        assert torch.equal(out.sequences, wanted.sequences)
        for step, logits in enumerate(wanted.logits):
            assert torch.equal(out.logits[step], logits), f"step {step}, forced={forced}"
        assert (type(cache_of(out)).__name__ == "PrunedDynamicCache") is forced


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_a_batch_is_the_row_alone(family):
    model = tiny(family, implementations(family)[0])
    session = tokenprune.patch(model, "divprune", keep=0.4)
    together = generate(model, batch(family).inputs, 2)
    traces = session.traces
    for row, parts in enumerate(RAGGED):
        single = batch(family, (parts,), seeds=(row,))
        alone = generate(model, single.inputs, 2)
        pad = batch(family).pads[row]
        assert (traces[0].kept_indices[row] - pad).tolist() == session.traces[0].kept_indices[0].tolist()
        for step in range(2):
            torch.testing.assert_close(together.logits[step][row], alone.logits[step][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_changes_the_logits_and_shortens_the_cache(family):
    model = tiny(family, implementations(family)[0])
    inputs = batch(family, EVEN).inputs
    wanted = generate(model, inputs, 2)
    session = tokenprune.patch(model, "divprune", keep=0.25)
    seen = []
    for layer in model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().blocks:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    out = generate(model, inputs, 2)
    assert [trace.status for trace in session.traces] == ["applied"]
    assert session.traces[0].n_in == (12, 12)
    assert session.traces[0].n_out == (3, 3)
    assert (out.logits[0] - wanted.logits[0]).abs().max() > 1e-2
    length = inputs["input_ids"].shape[1]
    layers = model.get_decoder().config.num_hidden_layers
    assert seen == [length - 9] * layers + [1] * layers
    for layer in cache_of(out).layers:
        assert layer.keys.shape[2] == length - 9 + 1
    assert cache_of(out).get_seq_length() == length + 1


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MROPE])
def test_packed_positions_are_those_of_a_sequence_that_never_had_the_dropped_tokens(family):
    dense, model = twins(family, implementations(family)[0])
    session = tokenprune.patch(model, "divprune", keep=0.5, positions="packed")
    ragged = batch(family)
    out = generate(model, ragged.inputs, 3)
    check_steps(dense, family, out, session.traces, ragged, 3, packed=True)


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_the_baselines_are_right_in_a_ragged_batch(method):
    dense, model = twins("llava")
    session = tokenprune.patch(model, method, keep=0.5)
    ragged = batch("llava")
    out = generate(model, ragged.inputs, 3)
    check_steps(dense, "llava", out, session.traces, ragged, 3)


def test_keep_auto_makes_ragged_counts_and_stays_right():
    dense, model = twins("llava")
    session = tokenprune.patch(model, "divprune", keep="auto", radius=0.8, min_keep=1, max_keep=0.9)
    ragged = batch("llava")
    out = generate(model, ragged.inputs, 3)
    assert all(radius <= 0.8 for row in session.traces[0].radius for radius in row)
    assert session.traces[0].n_out != session.traces[0].n_in
    check_steps(dense, "llava", out, session.traces, ragged, 3)
