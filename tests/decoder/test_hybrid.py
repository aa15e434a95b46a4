"""Decoders with recurrent layers among those of attention: tokens can leave before every layer, in ragged batches."""

import dataclasses

import families
import pytest
import torch
from families import EVEN, RAGGED, alone, batch, fresh, generate
from hybrid import CONFIG, FAMILY, N_LAYERS, only_alive
from oracle import check_tokens, generated
from oracle_layers import alive_by_layer, spans_of
from states import logits, same_run
from test_generation import second_turn
from test_pixels import CASES as PIXELS
from test_pixels import pixel_batch
from transformers import DynamicCache
from upstream import POSITIONS, cache_of, with_cache, with_features

import tokenprune
from tokenprune import AIM, DivPrune, FastV, InputError, OptionError
from tokenprune.reduction import pack


@pytest.fixture(scope="module", autouse=True)
def family():
    """The tables of the tests know the family while this module runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CONFIGS, FAMILY, CONFIG)
        patch.setattr(families, "MROPE", (*families.MROPE, FAMILY))
        yield


def pair(method, implementation="sdpa"):
    dense, model = families.twins(FAMILY, implementation)
    return dense, model, tokenprune.patch(model, method)


def last_logits(dense, row, alive, **options):
    """Logits `[V]` of the last token of a single unpadded row."""
    with only_alive(dense, alive, **options), torch.no_grad():
        return dense(**fresh(row.inputs), use_cache=False).logits[0, -1]


def alive_of(traces, row, prompt, length):
    return alive_by_layer(traces, row, prompt.pads[row], length, N_LAYERS)


def check(dense, out, traces, prompt, n):
    for row in range(len(prompt.rows)):
        single = alone(FAMILY, prompt.rows, row)(generated(out, row, n))
        alive = alive_of(traces, row, prompt, single.inputs["input_ids"].shape[1])
        with only_alive(dense, alive), torch.no_grad():
            check_tokens(out, row, n, dense(**fresh(single.inputs), use_cache=False).logits[0])


METHODS = {
    "before": DivPrune(keep=0.5),
    "once": FastV(layer=2, keep=0.25),
    "before a recurrent layer": FastV(layer=3),
    "progressive": AIM(merge=None, prune=(1, 4)),
    "both": [DivPrune(keep=0.5), AIM(merge=None, prune=(2, 4), importance="column_sum")],
}


def test_the_oracle_alone_is_the_dense_model():
    dense = families.tiny(FAMILY)
    for row, parts in enumerate(RAGGED):
        single = batch(FAMILY, (parts,), seeds=(row,))
        everything = [torch.ones(single.inputs["input_ids"].shape[1], dtype=torch.bool)] * N_LAYERS
        wanted = logits(dense, single.inputs)[0, -1]
        torch.testing.assert_close(last_logits(dense, single, everything), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
def test_a_ragged_batch_equals_a_dense_run_of_each_layer_on_what_is_left(name, implementation):
    dense, model, session = pair(METHODS[name], implementation)
    ragged = batch(FAMILY)
    out = generate(model, ragged.inputs, 4)
    assert session.traces[-1].n_out != session.traces[0].n_in == (16, 12, 8)
    check(dense, out, session.traces, ragged, 4)
    assert not same_run(generate(dense, ragged.inputs, 4), out)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
def test_a_row_without_padding(name, implementation):
    dense, model, session = pair(METHODS[name], implementation)
    single = batch(FAMILY, RAGGED[:1])
    check(dense, generate(model, single.inputs, 4), session.traces, single, 4)


def test_merged_tokens_go_through_recurrent_layers():
    from oracle_layers import naive_groups

    method = AIM(merge=0.5, prune=(2, 4))
    dense, model, session = pair(method)
    ragged = batch(FAMILY)
    out = generate(model, ragged.inputs, 1)
    for row, parts in enumerate(RAGGED):
        single = batch(FAMILY, (parts,), seeds=(row,))

        def merge(x, parts=parts):
            x = x.clone()
            before = x[0].clone()
            for span in spans_of(parts):
                for place, weights in naive_groups(before[span], len(span) // 2).items():
                    x[0, span[place]] = sum(weight * before[span[i]] for i, weight in weights.items())
            return x

        alive = alive_of(session.traces, row, ragged, single.inputs["input_ids"].shape[1])
        wanted = last_logits(dense, single, alive, merge=merge)
        torch.testing.assert_close(out.logits[0][row], wanted, atol=1e-4, rtol=1e-4)


def test_keeping_everything_changes_no_bit():
    dense, model, session = pair(FastV(layer=2, keep=1.0))
    ragged = batch(FAMILY)
    wanted = generate(dense, ragged.inputs, 3)
    for forced in (False, True):
        session.forced = forced
        assert same_run(generate(model, ragged.inputs, 3), wanted)


def test_caches_of_attention_layers_are_as_short_as_the_schedule_says():
    _, model, _ = pair(AIM(merge=None, prune=(1, 4)))
    out = generate(model, batch(FAMILY).inputs, 1)
    layers = cache_of(out).layers
    assert [layers[i].keys.shape[2] for i in (1, 4)] == [26, 12]
    assert cache_of(out).get_seq_length() == 26


@pytest.mark.parametrize("name", ["before", "progressive"])
def test_a_second_turn_and_no_cache_and_beams(name):
    dense, model, session = pair(METHODS[name])
    ragged = batch(FAMILY)
    first, traces = generate(model, ragged.inputs, 3), session.traces
    length = ragged.inputs["input_ids"].shape[1]
    ids = torch.cat([first.sequences, second_turn(FAMILY, ragged, first, 4, None)], 1)
    mask = torch.cat([ragged.inputs["attention_mask"], torch.ones(3, 7, dtype=torch.long)], 1)
    inputs = {"input_ids": ids, "attention_mask": mask, **with_cache(cache_of(first))}
    out = generate(model, {**inputs, **with_features()}, 2)
    for row, parts in enumerate(RAGGED):
        for step in range(2):
            extra = out.sequences[row : row + 1, length : length + 7 + step]
            single = batch(FAMILY, (parts,), seeds=(row,), extra=extra)
            alive = alive_of(traces, row, ragged, single.inputs["input_ids"].shape[1])
            torch.testing.assert_close(out.logits[step][row], last_logits(dense, single, alive), atol=1e-4, rtol=1e-4)
    check(dense, generate(model, ragged.inputs, 1, use_cache=False), session.traces, ragged, 1)
    out = generate(model, ragged.inputs, 3, num_beams=2, output_scores=True, length_penalty=1.0)
    for row, (parts, ids) in enumerate(zip(RAGGED, out.sequences, strict=True)):
        score = 0.0
        for step in range(3):
            single = batch(FAMILY, (parts,), seeds=(row,), extra=ids[None, length : length + step])
            alive = alive_by_layer(
                session.traces, 2 * row, ragged.pads[row], single.inputs["input_ids"].shape[1], N_LAYERS
            )
            score += float(last_logits(dense, single, alive).log_softmax(-1)[ids[length + step]]) / 3
        assert float(out.sequences_scores[row]) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("method", [DivPrune(keep=0.5), FastV(layer=2)], ids=["before", "inside"])
def test_a_later_turn_whose_rows_lose_different_numbers_of_tokens_is_refused(method):
    """Recurrent layers would run over the slots that fill short rows up, between two calls."""
    _, model, session = pair(method)
    first, cache = batch(FAMILY, EVEN), DynamicCache(config=model.config)

    def turn(rows):
        inputs = fresh(batch(FAMILY, rows, seeds=(5, 6)).inputs)
        past, length = cache.get_seq_length(), inputs["input_ids"].shape[1]
        inputs["attention_mask"] = torch.ones(2, past + length, dtype=torch.long)
        inputs[POSITIONS] = torch.arange(past, past + length).expand(3, 2, -1)
        with torch.no_grad():
            model(**inputs, **with_cache(cache))

    with torch.no_grad():
        model(**fresh(first.inputs), **with_cache(cache))
    length, traces = cache.get_seq_length(), session.traces
    with pytest.raises(InputError, match=r"different numbers of tokens.*recurrent layers"):
        turn(((1, (3, 4), 2), (9, (2, 2), 2)))
    assert cache.get_seq_length() == length
    assert session.traces is traces
    turn(((1, (3, 4), 2), (1, (3, 4), 2)))
    assert session.traces is not traces
    assert len(set(session.traces[0].n_out)) == 1


def test_static_cache():
    dense, model, session = pair(METHODS["progressive"])
    ragged = batch(FAMILY)
    check(dense, generate(model, ragged.inputs, 3, cache_implementation="static"), session.traces, ragged, 3)


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl-video"])
def test_pixels(kind):
    case = dataclasses.replace(PIXELS[kind], family=FAMILY)
    dense, model, session = pair([DivPrune(keep=0.5), FastV(layer=2)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_pixels.MROPE", (FAMILY,))
        ragged = pixel_batch(case, (0, 1, 2))
        out = generate(model, ragged.inputs, 2)
        assert session.traces[0].images == (case.counts,) * 3
        length = ragged.inputs["input_ids"].shape[1]
        for row in range(3):
            for step in range(2):
                single = pixel_batch(case, (row,), extra=out.sequences[row : row + 1, length : length + step])
                alive = alive_of(session.traces, row, ragged, single.inputs["input_ids"].shape[1])
                wanted = last_logits(dense, single, alive)
                torch.testing.assert_close(out.logits[step][row], wanted, atol=1e-4, rtol=1e-4)


def test_a_recurrent_layer_is_ranked_by_the_attention_before_it():
    model, ragged = families.tiny(FAMILY), batch(FAMILY)
    kept = []
    for layer in (2, 3, 4):
        with tokenprune.patch(model, FastV(layer=layer)) as session:
            generate(model, ragged.inputs, 1)
        kept.append([row.tolist() for row in session.traces[0].kept_indices])
    assert kept[0] == kept[1] == kept[2]
    with pytest.raises(OptionError, match=r"layers up to 0, none of which.*choose later layers"):
        tokenprune.patch(model, FastV(layer=1))


def test_padding_slots_can_come_first():
    kept = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    keep = pack(kept, left=True)
    assert keep.index.tolist() == [[0, 2, 5], [4, 5, 1]]
    assert keep.valid.tolist() == [[True] * 3, [False, False, True]]
    y = torch.tensor([[[0.0], [2.0], [5.0]], [[-1.0], [-1.0], [1.0]]])
    assert keep.restore(y, length=6)[..., 0].tolist() == [[0, 0, 2, 2, 2, 5], [1] * 6]
