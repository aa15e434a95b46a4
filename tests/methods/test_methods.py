"""The methods on random tensors, without a model, and the rules for methods that a user writes."""

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from families import EVEN, RAGGED, batch, fresh, generate, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_steps
from torch import Tensor
from upstream import pooled_in

import tokenprune
from tokenprune import DivPrune, InputError, Method, OptionError, Random, Uniform
from tokenprune.api import build_method
from tokenprune.methods.base import options_of
from tokenprune.methods.options import at_least, one_of, option
from tokenprune.reduction import Keep, Merge
from tokenprune.schedule import count
from tokenprune.signals import Budget, Signals, Stage

quick = settings(deadline=None, max_examples=60, database=None)
METHODS = (DivPrune, Random, Uniform)


def features(n_images: int, n_tokens: int, *, seed: int = 0, width: int = 8) -> Tensor:
    return torch.randn(n_images, n_tokens, width, generator=torch.Generator().manual_seed(seed))


def select(method: Method, x: Tensor, *, grid=None, ids=None) -> Keep:
    """What `method` keeps of the images `x` `[B, N, D]`."""
    signals = Signals(x, grid, tuple(range(len(x))) if ids is None else ids)
    return method.before_llm(signals, method.budget(x.shape[1]))


def rows_of(keep: Keep) -> list[list[int]]:
    """The kept tokens of each image."""
    valid = torch.ones_like(keep.index, dtype=torch.bool) if keep.valid is None else keep.valid
    return [index[slots].tolist() for index, slots in zip(keep.index, valid, strict=True)]


def coverage(x: Tensor, row: list[int]) -> float:
    """Largest cosine distance from a token of `x` `[N, D]` to its nearest kept one, pair by pair."""
    unit = (x / x.norm(dim=1, keepdim=True)).double()
    return max(min(1 - float(token @ unit[kept]) for kept in row) for token in unit)


def test_a_fraction_is_rounded_half_up():
    assert count(0.098, 576) == 56
    assert [count(0.5, n) for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert [count(0.25, n) for n in (2, 6, 10)] == [1, 2, 3]


@quick
@given(st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True), st.integers(1, 3000), st.integers(1, 3000))
def test_the_count_grows_with_the_fraction_and_with_the_image(keep, other, n_tokens, more):
    n_keep = count(keep, n_tokens)
    assert 1 <= n_keep <= n_tokens
    assert abs(n_keep - keep * n_tokens) <= 0.5 + 1e-9 or n_keep == 1
    assert count(min(keep, other), n_tokens) <= count(max(keep, other), n_tokens)
    assert count(keep, min(n_tokens, more)) <= count(keep, max(n_tokens, more))
    assert count(1.0, n_tokens) == n_tokens


@quick
@given(st.integers(1, 5000), st.integers(1, 3000))
def test_an_int_counts_tokens_and_never_more_than_there_are(keep, n_tokens):
    assert count(keep, n_tokens) == min(keep, n_tokens)


@quick
@given(
    st.sampled_from(METHODS),
    st.integers(1, 3),
    st.integers(1, 40),
    st.one_of(st.floats(0.01, 1.0), st.integers(1, 50)),
    st.integers(0, 99),
)
def test_every_method_keeps_as_many_distinct_tokens_as_are_due_in_ascending_order(cls, n_images, n_tokens, keep, seed):
    method = cls(keep=keep)
    due = count(keep, n_tokens)
    assert method.budget(n_tokens) == Budget(due, due)
    kept = select(method, features(n_images, n_tokens, seed=seed))
    assert kept.index.shape == (n_images, due)
    assert kept.index.dtype == torch.int64
    for row in rows_of(kept):
        assert all(a < b for a, b in pairwise(row))
        assert row[0] >= 0
        assert row[-1] < n_tokens


@pytest.mark.parametrize("cls", METHODS)
def test_the_same_tokens_are_kept_every_time_and_the_features_are_left_alone(cls):
    x = features(3, 20)
    before = x.clone()
    first = select(cls(keep=7), x)
    torch.manual_seed(123)
    second = select(cls(keep=7), x)
    assert torch.equal(first.index, second.index)
    assert torch.equal(x, before)


@pytest.mark.parametrize("cls", METHODS)
def test_the_global_random_state_is_not_touched(cls):
    before = torch.get_rng_state()
    select(cls(keep=3), features(2, 9))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", [*(cls(keep=0.4) for cls in METHODS), DivPrune(keep="auto", radius=0.6)], ids=repr)
def test_what_is_kept_of_an_image_does_not_depend_on_the_images_beside_it(method):
    x = features(4, 15)
    together = rows_of(select(method, x, ids=(0, 1, 0, 2)))
    for i, ordinal in enumerate((0, 1, 0, 2)):
        assert rows_of(select(method, x[i : i + 1], ids=(ordinal,))) == [together[i]]
    flipped = rows_of(select(method, x.flip(0), ids=(2, 0, 1, 0)))
    assert flipped[::-1] == together


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_of_features_will_do(cls, dtype):
    kept = select(cls(keep=5), features(2, 12).to(dtype).transpose(0, 1).contiguous().transpose(0, 1))
    assert kept.index.shape == (2, 5)


def test_random_follows_its_seed_and_the_ordinal_of_the_image_only():
    x, y = features(2, 30), features(2, 30, seed=1)
    kept = rows_of(select(Random(keep=10), x, ids=(0, 1)))
    assert kept == rows_of(select(Random(keep=10), y, ids=(0, 1)))
    assert kept[0] != kept[1]
    assert kept == rows_of(select(Random(keep=10), x, ids=(1, 0)))[::-1]
    assert kept != rows_of(select(Random(keep=10, seed=1), x, ids=(0, 1)))


def test_random_draws_every_token_about_equally_often():
    drawn = Counter(
        token for seed in range(400) for token in rows_of(select(Random(keep=5, seed=seed), features(1, 20)))[0]
    )
    assert set(drawn) == set(range(20))
    assert all(60 <= times <= 140 for times in drawn.values())  # 100 are expected, the deviation is 8.7


@quick
@given(st.integers(1, 200), st.integers(1, 200))
def test_uniform_without_a_grid_keeps_the_middle_of_equal_shares(n_tokens, keep):
    (row,) = rows_of(select(Uniform(keep=keep), features(1, n_tokens, width=1)))
    share = n_tokens / len(row)
    assert all(abs(token - (i + 0.5) * share) <= 1 for i, token in enumerate(row))
    gaps = {b - a for a, b in pairwise(row)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@quick
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 600))
def test_uniform_on_a_grid_spaces_rows_and_the_tokens_within_them_evenly(height, width, keep):
    (kept,) = rows_of(select(Uniform(keep=keep), features(1, height * width, width=1), grid=(height, width)))
    assert len(kept) == len(set(kept)) == min(keep, height * width)
    assert kept == sorted(kept)
    lines: dict[int, list[int]] = {}
    for token in kept:
        lines.setdefault(token // width, []).append(token % width)
    sizes = [len(line) for line in lines.values()]
    assert max(sizes) - min(sizes) <= 1
    for i, line in enumerate(sorted(lines)):
        assert abs(line - (i + 0.5) * height / len(lines)) <= 1, "rows are not evenly spaced"
        for j, column in enumerate(lines[line]):
            assert abs(column - (j + 0.5) * width / len(lines[line])) <= 1, "tokens of a row are not evenly spaced"


def test_uniform_keeps_a_quarter_of_a_grid_as_a_grid_of_half_the_side():
    (kept,) = rows_of(select(Uniform(keep=0.25), features(1, 24 * 24), grid=(24, 24)))
    assert kept == [row * 24 + column for row in range(1, 24, 2) for column in range(1, 24, 2)]


@quick
@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 99))
def test_the_radius_of_divprune_is_how_far_dropped_tokens_are_from_kept_ones(n_tokens, keep, seed):
    x = features(2, n_tokens, seed=seed)
    kept = select(DivPrune(keep=keep), x)
    for i, row in enumerate(rows_of(kept)):
        assert float(kept.radius[i]) == pytest.approx(coverage(x[i], row), abs=1e-5)


def test_divprune_covers_better_than_the_baselines():
    x = features(1, 60)
    radii = {cls: coverage(x[0], rows_of(select(cls(keep=10), x))[0]) for cls in METHODS}
    assert radii[DivPrune] < min(radii[Random], radii[Uniform])


def test_divprune_keeps_one_token_of_each_cluster():
    centres = torch.eye(6)
    x = (centres.repeat_interleave(5, 0) + 0.01 * features(1, 30, width=6)[0])[None]
    assert sorted(token // 5 for token in rows_of(select(DivPrune(keep=6), x))[0]) == list(range(6))


@quick
@given(st.integers(1, 25), st.floats(0, 2), st.integers(0, 99))
def test_keep_auto_keeps_as_few_as_cover_the_image_within_the_radius(n_tokens, radius, seed):
    x = features(3, n_tokens, seed=seed)
    kept = select(DivPrune(keep="auto", radius=radius), x)
    for i, row in enumerate(rows_of(kept)):
        assert len(row) == len(set(row)) >= 1
        assert row == sorted(row)
        assert coverage(x[i], row) <= radius + 1e-5
        assert float(kept.radius[i]) == pytest.approx(coverage(x[i], row), abs=1e-5)
        if len(row) > 1:  # the same greedy choice, one token shorter, does not cover the image
            assert float(select(DivPrune(keep=len(row) - 1), x[i : i + 1]).radius) > radius - 1e-5


def test_keep_auto_keeps_more_of_an_image_with_more_in_it():
    plain, busy = torch.ones(1, 16, 8) + 0.01 * features(1, 16), features(1, 16, seed=3)
    kept = select(DivPrune(keep="auto", radius=0.2), torch.cat([plain, busy]))
    few, many = map(len, rows_of(kept))
    assert few == 1
    assert many > 5
    assert kept.index.shape == (2, many)
    assert not kept.valid.all()
    assert rows_of(kept)[1] == rows_of(select(DivPrune(keep="auto", radius=0.2), busy))[0]


@pytest.mark.parametrize(("options", "low", "high"), [
    ({"min_keep": 4}, 4, 16),
    ({"min_keep": 0.5}, 8, 16),
    ({"max_keep": 3}, 1, 3),
    ({"max_keep": 0.25}, 1, 4),
    ({"min_keep": 9, "max_keep": 5}, 5, 5),
    ({"min_keep": 90, "max_keep": 50}, 16, 16),
])  # fmt: skip
def test_keep_auto_stays_between_min_keep_and_max_keep(options, low, high):
    assert DivPrune(keep="auto", radius=0.1, **options).budget(16) == Budget(low, high)
    x = torch.cat([torch.ones(1, 16, 8), features(1, 16)])
    for radius in (0.0, 0.1, 2.0):
        for row in rows_of(select(DivPrune(keep="auto", radius=radius, **options), x)):
            assert low <= len(row) <= high
    everything = rows_of(select(DivPrune(keep="auto", radius=2.0, **options), x))
    assert [len(row) for row in everything] == [low, low]


def test_equal_tokens_are_kept_once_each_from_the_front():
    kept = select(DivPrune(keep=4), torch.ones(2, 9, 8))
    assert rows_of(kept) == [[0, 1, 2, 3]] * 2
    assert kept.radius.tolist() == [0.0, 0.0]


def test_a_method_is_frozen_and_compares_by_its_options():
    assert DivPrune(keep=0.5) == DivPrune(keep=0.5) != DivPrune(keep=0.4)
    assert copy.deepcopy(Random(keep=3, seed=7)) == Random(keep=3, seed=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DivPrune(keep=0.5).keep = 0.4
    with pytest.raises(TypeError):
        DivPrune(0.5)


@pytest.mark.parametrize("method", [tokenprune.AIM, tokenprune.SpAtten])
def test_a_keep_that_cannot_be_set_is_shown_nowhere(method):
    assert "keep=" not in repr(method())
    assert "keep" not in options_of(method)
    with pytest.raises(OptionError, match=r"no option 'kep'; it has (merge|tokens)"):
        build_method(method.name, kep=1)
    with pytest.raises(OptionError, match="no keep; got"):
        build_method(method.name, keep=0.5)


@pytest.mark.parametrize("order", ["random first", "divprune first"])
def test_two_methods_work_one_after_the_other(order):
    dense = tiny("llava")
    model = copy.deepcopy(dense)
    methods = [Random(keep=0.5), DivPrune(keep=0.5)]
    session = tokenprune.patch(model, methods if order == "random first" else methods[::-1])
    prompt = batch("llava")
    out = generate(model, prompt.inputs, 2)
    first, second = session.traces
    assert [first.method, second.method] == ["random", "divprune"][:: 1 if order == "random first" else -1]
    assert first.n_in == (16, 12, 8)
    assert first.n_out == second.n_in == (8, 6, 4)
    assert second.n_out == (4, 3, 2)
    for row in range(3):
        assert torch.equal(first.kept_indices[row], second.visual_indices[row])
        assert set(second.kept_indices[row].tolist()) < set(first.kept_indices[row].tolist())
    assert second.images == ((6, 2), (6,), (2, 2))
    check_steps(dense, "llava", out, session.traces, prompt, 2)


def test_the_second_method_sees_what_the_first_one_left():
    model, prompt = tiny("llava"), batch("llava", EVEN)
    session = tokenprune.patch(model, [Uniform(keep=0.5), DivPrune(keep=3)])
    with torch.no_grad():
        model(**fresh(prompt.inputs))
    first, second = session.traces
    images = pooled_in(prompt.inputs)
    for row, image in enumerate(images):
        left = first.kept_indices[row] - first.visual_indices[row][0]
        (chosen,) = rows_of(select(DivPrune(keep=3), image[left][None]))
        assert (second.kept_indices[row] - first.visual_indices[row][0]).tolist() == left[chosen].tolist()


@dataclass(frozen=True, kw_only=True)
class Loudest(Method):
    """Keep the tokens of largest norm."""

    name: ClassVar[str] = "loudest"
    skip: int = 0

    def before_llm(self, signals: Signals, budget: Budget) -> Keep:
        norms = signals.features.norm(dim=-1)
        return Keep(norms.argsort(dim=1, descending=True)[:, self.skip : self.skip + budget.high].sort(dim=1).values)


def test_a_method_of_ones_own_is_ten_lines_and_an_instance():
    dense = tiny("llava")
    model = copy.deepcopy(dense)
    session = tokenprune.patch(model, Loudest(keep=0.5))
    prompt = batch("llava")
    out = generate(model, prompt.inputs, 3)
    assert session.traces[0].method == "loudest"
    images = pooled_in(prompt.inputs)
    loudest = images[0].norm(dim=-1).topk(6).indices.sort().values
    kept = session.traces[0].kept_indices[0] - session.traces[0].visual_indices[0][0]
    assert kept[:6].tolist() == loudest.tolist()
    check_steps(dense, "llava", out, session.traces, prompt, 3)


def test_a_method_without_a_name_goes_by_that_of_its_class():
    class Front(Method):
        def before_llm(self, signals, budget):
            return Keep(torch.arange(budget.high).expand(len(signals.features), -1))

    model = tiny("llava")
    session = tokenprune.patch(model, Front(keep=2))
    with torch.no_grad():
        model(**batch("llava").inputs)
    assert session.traces[0].method == "Front"
    assert session.traces[0].n_out == (4, 2, 4)


def test_a_method_without_a_name_does_not_take_the_one_that_its_parent_got():
    class Front(Method):
        pass

    class Back(Front):
        pass

    class Named(DivPrune):
        pass

    assert [Front.name, Back.name, Named.name] == ["Front", "Back", "divprune"]


def test_an_option_of_ones_own_is_checked_as_it_declares():
    @dataclass(frozen=True, kw_only=True)
    class Every(Method):
        step: int = option(2, at_least(1))
        order: str = option("up", one_of("up", "down", None))

    assert options_of(Every) == {"keep": 0.25, "step": 2, "order": "up"}
    assert Every(step=3, order=None).step == 3
    for wrong, told in {"step": "an int of at least 1, got True", "order": "'up', 'down' or None, got True"}.items():
        with pytest.raises(OptionError, match=f"^{wrong} must be {told}$"):
            Every(**{wrong: True})
    with pytest.raises(OptionError, match="keep as an int counts"):
        Every(keep=0)


def first(x: Tensor, k: int) -> Tensor:
    """The first `k` positions of each of the images `x`, `[B, k]`."""
    return torch.arange(k).expand(len(x), -1)


ANSWERS = {
    "too few tokens": lambda x, k: Keep(first(x, k - 1)),
    "too many tokens": lambda x, k: Keep(first(x, k + 1)),
    "a row too many": lambda x, k: Keep(torch.arange(k).expand(len(x) + 1, -1)),
    "no batch dimension": lambda x, k: Keep(torch.arange(k)),
    "the same token twice": lambda x, k: Keep(torch.zeros(len(x), k, dtype=torch.int64)),
    "a token past the end": lambda x, k: Keep(first(x, k) + x.shape[1]),
    "a token before the start": lambda x, k: Keep(first(x, k) - 1),
    "a mask in place of positions": lambda x, k: Keep(torch.ones(len(x), k, dtype=torch.bool)),
    "no slot that counts": lambda x, k: Keep(first(x, k), torch.zeros(len(x), k, dtype=torch.bool)),
    "valid of another shape": lambda x, k: Keep(first(x, k), torch.ones(len(x), k - 1, dtype=torch.bool)),
    "a bare tensor": first,
    "nothing": lambda x, k: None,
    "groups that stand nowhere": lambda x, k: Merge(first(x, k), torch.zeros(x.shape[:2], dtype=torch.int64)),
    "a group too many": lambda x, k: Merge(first(x, k), torch.arange(x.shape[1]).expand(len(x), -1)),
    "groups of other tokens": lambda x, k: Merge(first(x, k), first(x, k)),
    "groups in a float": lambda x, k: Merge(first(x, k), torch.zeros(x.shape[:2])),
}


class Wrong(Method):
    """Gives one of `ANSWERS`."""

    name: ClassVar[str] = "wrong"
    answer: ClassVar[str] = ""

    def before_llm(self, signals: Signals, budget: Budget) -> Keep:
        return ANSWERS[self.answer](signals.features, budget.high)


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_wrong_answer_of_a_method_is_refused_by_name(answer, monkeypatch):
    monkeypatch.setattr(Wrong, "answer", answer)
    model = tiny("llava")
    session = tokenprune.patch(model, Wrong(keep=3))
    with pytest.raises(InputError, match=r"'wrong'.*'before_llm'"), torch.no_grad():
        model(**batch("llava", EVEN).inputs)
    assert session.traces == ()


@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if "group" not in answer] + ["a merge"])
def test_a_wrong_answer_after_a_layer_is_refused_by_name(answer):
    class WrongLater(Method):
        def schedule(self, n_layers):
            return (Stage(1, 3),)

        def llm_layer(self, signals, budget):
            if answer == "a merge":
                return Merge(first(signals.importance, 3), (torch.arange(12) // 4).expand(2, -1))
            return ANSWERS[answer](signals.importance, budget.high)

    model = tiny("llava")
    session = tokenprune.patch(model, WrongLater())
    with pytest.raises(InputError, match=r"'WrongLater'.*'llm_layer'.*layer 1"), torch.no_grad():
        model(**batch("llava", EVEN).inputs)
    assert session.traces == ()


def test_the_message_about_a_wrong_shape_says_what_was_due(monkeypatch):
    monkeypatch.setattr(Wrong, "answer", "too few tokens")
    model = tiny("llava")
    tokenprune.patch(model, Wrong(keep=3))
    with pytest.raises(InputError, match=r"shape \[2, 2\].*2 rows of 3 to 3 of 12 tokens were due"), torch.no_grad():
        model(**batch("llava", EVEN).inputs)


@pytest.mark.parametrize("seed", ["7", 1.5, None, True, 2**80])
def test_a_seed_that_the_generator_cannot_take_is_refused_when_the_method_is_made(seed):
    with pytest.raises(OptionError, match="seed"):
        Random(seed=seed)


@pytest.mark.parametrize("keep", [0.3, 1, 1.0])
def test_counts_in_a_model_are_those_of_the_schedule(keep):
    model = tiny("llava")
    session = tokenprune.patch(model, "uniform", keep=keep)
    with torch.no_grad():
        model(**batch("llava").inputs)
    sizes = [[part[0] * part[1] for part in row if isinstance(part, tuple)] for row in RAGGED]
    assert session.traces[0].images == tuple(map(tuple, sizes))
    assert session.traces[0].n_out == tuple(sum(count(keep, size) for size in row) for row in sizes)
