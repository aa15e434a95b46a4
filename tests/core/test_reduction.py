"""`Keep` and `pack` against naive loops."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenprune
from tokenprune.reduction import Keep, Merge, gather, pack

quick = settings(deadline=None, max_examples=60, database=None)


@st.composite
def kept_rows(draw, *, at_least=0, even=False):
    """Length L of the rows and the positions that each of up to 4 rows keeps."""
    n_rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    size = draw(st.integers(max(1, at_least), length)) if even else None
    rows = []
    for _ in range(n_rows):
        low, high = (size, size) if even else (at_least, length)
        rows.append(sorted(draw(st.sets(st.integers(0, length - 1), min_size=low, max_size=high))))
    return length, rows


def keep_of(rows: list[list[int]]) -> Keep:
    return Keep(torch.tensor(rows))


def packed(rows: list[list[int]], length: int) -> Keep:
    """Rows that keep different positions, with `valid` in any case."""
    kept = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, positions in zip(kept, rows, strict=True):
        row[positions] = True
    keep = pack(kept)
    full = len(set(map(len, rows))) == 1 and len(rows[0]) > 0
    assert (keep.valid is None) == full
    return Keep(keep.index, torch.ones_like(keep.index, dtype=torch.bool)) if full else keep


def taken(x: Tensor, rows: list[list[int]]) -> Tensor:
    """`x` `[B, N, ...]` with tokens taken one by one."""
    return torch.stack([torch.stack([x[i, j] for j in row]) for i, row in enumerate(rows)])


def numbered(*shape: int) -> Tensor:
    """A tensor in which no two entries are equal."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@quick
@given(
    kept_rows(even=True), st.sampled_from([(), (3,), (2, 3)]), st.sampled_from([torch.float32, torch.int64, torch.bool])
)
def test_apply_takes_the_kept_tokens_of_every_row(case, tail, dtype):
    length, rows = case
    x = numbered(len(rows), length, *tail)
    x = x % 3 == 0 if dtype == torch.bool else x.to(dtype)
    before = x.clone()
    out = keep_of(rows).apply(x)
    assert out.dtype == dtype
    assert torch.equal(out, taken(x, rows))
    assert torch.equal(x, before)


@quick
@given(kept_rows(even=True), st.integers(1, 4))
def test_apply_along_a_later_dimension_leaves_the_ones_before_it_alone(case, planes):
    length, rows = case
    x = numbered(planes, len(rows), length, 2)
    out = keep_of(rows).apply(x, dim=2)
    for plane in range(planes):
        assert torch.equal(out[plane], taken(x[plane], rows))


@quick
@given(kept_rows(even=True))
def test_apply_does_not_mind_strides(case):
    length, rows = case
    n_rows, keep = len(rows), keep_of(rows)
    views = {
        "transposed": numbered(length, n_rows, 3).transpose(0, 1),
        "every other": numbered(n_rows, 2 * length, 6)[:, ::2, 1::2],
        "expanded": numbered(n_rows, length, 1).expand(-1, -1, 3),
        "one row for all": numbered(1, length, 3).expand(n_rows, -1, -1),
        "offset": numbered(n_rows + 1, length + 1, 4)[1:, 1:, 1:],
    }
    for name, view in views.items():
        assert torch.equal(keep.apply(view), taken(view.contiguous(), rows)), name


@quick
@given(kept_rows(even=True))
def test_one_row_of_values_serves_all_rows_of_the_index(case):
    length, rows = case
    keep, x = keep_of(rows), numbered(1, length, 2)
    assert torch.equal(keep.apply(x), taken(x.expand(len(rows), -1, -1), rows))
    positions = numbered(3, 1, length)
    out = keep.apply(positions, dim=2)
    assert out.shape == (3, len(rows), len(rows[0]))
    assert torch.equal(out[1], taken(positions[1].expand(len(rows), -1), rows))


def test_gather_with_an_index_that_is_an_expanded_view():
    index = torch.tensor([[0, 2]]).expand(3, -1)
    x = numbered(3, 4, 2)
    assert torch.equal(gather(x, index), x[:, [0, 2]])


@quick
@given(kept_rows(at_least=1))
def test_restore_carries_the_nearest_earlier_kept_token(case):
    length, rows = case
    keep = packed(rows, length)
    y = numbered(*keep.index.shape, 2) + 1
    out = keep.restore(y, length=length)
    assert out.shape == (len(rows), length, 2)
    for i, row in enumerate(rows):
        slot_of = {position: slot for slot, position in enumerate(keep.index[i].tolist()) if keep.valid[i, slot]}
        for position in range(length):
            nearest = max((kept for kept in row if kept <= position), default=row[0])
            assert torch.equal(out[i, position], y[i, slot_of[nearest]]), (rows, i, position)


@quick
@given(kept_rows(at_least=1))
def test_restoring_gives_every_kept_token_itself_back(case):
    length, rows = case
    keep = packed(rows, length)
    x = numbered(len(rows), length, 2)
    out = keep.restore(keep.apply(x), length=length)
    for i, row in enumerate(rows):
        assert torch.equal(out[i, row], x[i, row])


@quick
@given(kept_rows(at_least=1), st.integers(1, 3))
def test_what_is_restored_in_a_row_does_not_depend_on_the_rows_beside_it(case, extra):
    length, rows = case
    fuller = sorted(set(rows[0]) | set(range(min(length, len(rows[0]) + extra))))
    x = numbered(1, length, 2)

    def restored(all_rows):
        keep = packed(all_rows, length)
        return keep.restore(keep.apply(x), length=length)[0]

    assert torch.equal(restored([rows[0]]), restored([rows[0], fuller]))


@quick
@given(kept_rows(even=True), st.data())
def test_one_reduction_after_another_equals_the_two_in_one(case, data):
    length, rows = case
    width = len(rows[0])
    size = data.draw(st.integers(1, width))
    chosen = st.sets(st.integers(0, width - 1), min_size=size, max_size=size).map(sorted)
    first, second = keep_of(rows), keep_of([data.draw(chosen) for _ in rows])
    x = numbered(len(rows), length, 2)
    both = first.then(second)
    assert torch.equal(both.apply(x), second.apply(first.apply(x)))
    assert both.valid is None
    assert all(a < b for row in both.index.tolist() for a, b in pairwise(row))


@quick
@given(kept_rows(at_least=1), st.data())
def test_a_slot_of_a_chain_counts_where_it_counts_in_both_links(case, data):
    length, rows = case
    first = packed(rows, length)
    width = first.index.shape[1]
    again = [sorted(data.draw(st.sets(st.integers(0, width - 1)))) for _ in rows]
    second = packed(again, width)
    both = first.then(second)
    for i, row in enumerate(rows):
        kept = [int(first.index[i, slot]) for slot in again[i] if first.valid[i, slot]]
        assert both.index[i][both.valid[i]].tolist() == kept
        assert set(kept) <= set(row)
    half = Keep(first.index).then(second)
    assert torch.equal(half.valid, second.valid)
    other = first.then(Keep(second.index))
    assert torch.equal(other.valid, first.valid.gather(1, second.index))


def test_the_radius_of_a_chain_is_that_of_its_last_link():
    first = Keep(torch.tensor([[0, 2, 3]]), radius=torch.tensor([0.5]))
    second = Keep(torch.tensor([[1]]), radius=torch.tensor([0.7]))
    assert torch.equal(first.then(second).radius, torch.tensor([0.7]))


def test_links_of_different_batches_do_not_chain():
    first, second = keep_of([[0, 1], [1, 2]]), keep_of([[0]])
    with pytest.raises(tokenprune.InputError, match=r"1 rows cannot follow one of 2 rows"):
        first.then(second)


@quick
@given(kept_rows())
def test_pack_keeps_exactly_what_it_is_told(case):
    length, rows = case
    keep = packed(rows, length)
    assert keep.index.shape == keep.valid.shape == (len(rows), max(1, *map(len, rows)))
    assert keep.index.dtype == torch.int64
    for index, valid, row in zip(keep.index.tolist(), keep.valid, rows, strict=True):
        assert all(a < b for a, b in pairwise(index)), "ascending and distinct, fillers included"
        assert all(0 <= position < length for position in index)
        assert torch.tensor(index)[valid].tolist() == row


@quick
@given(st.integers(1, 4), st.integers(1, 12))
def test_keeping_everything_is_the_identity(n_rows, length):
    keep = packed([list(range(length))] * n_rows, length)
    x = numbered(n_rows, length, 3)
    assert torch.equal(keep.index, torch.arange(length).expand(n_rows, -1))
    assert keep.valid.all()
    assert torch.equal(keep.apply(x), x)
    assert torch.equal(keep.restore(x, length=length), x)
    assert torch.equal(keep.then(keep).index, keep.index)
    assert torch.equal(keep.source(length=length), keep.index)


def test_a_batch_in_which_no_row_keeps_anything_has_one_slot_that_does_not_count():
    keep = packed([[], []], 5)
    assert keep.index.shape == (2, 1)
    assert not keep.valid.any()


@st.composite
def merges(draw, n_rows, n_tokens, *, weighted=True):
    """A merge of `n_tokens` tokens into some number of groups, each of which stands at one of its tokens."""
    n_groups = draw(st.integers(1, n_tokens))
    index, assign = [], []
    for _ in range(n_rows):
        places = sorted(draw(st.sets(st.integers(0, n_tokens - 1), min_size=n_groups, max_size=n_groups)))
        row = [draw(st.integers(0, n_groups - 1)) for _ in range(n_tokens)]
        for group, place in enumerate(places):
            row[place] = group
        index.append(places)
        assign.append(row)
    weight = None
    if weighted and draw(st.booleans()):
        weight = torch.tensor([[draw(st.integers(1, 5)) for _ in range(n_tokens)] for _ in range(n_rows)]).float()
    return Merge(torch.tensor(index), torch.tensor(assign), weight)


def naive_means(merge: Merge, x: Tensor) -> Tensor:
    out = torch.zeros(*merge.index.shape, *x.shape[2:], dtype=torch.float64)
    for row, groups in enumerate(merge.assign.tolist()):
        for group in range(merge.index.shape[1]):
            members = [i for i, one in enumerate(groups) if one == group]
            weights = [1.0 if merge.weight is None else float(merge.weight[row, i]) for i in members]
            out[row, group] = sum(w * x[row, i].double() for w, i in zip(weights, members, strict=True)) / sum(weights)
    return out


@quick
@given(st.data(), st.integers(1, 3), st.integers(1, 9), st.sampled_from([(), (3,), (2, 3)]))
def test_merging_takes_the_weighted_mean_of_every_group(data, n_rows, n_tokens, tail):
    merge = data.draw(merges(n_rows, n_tokens))
    x = numbered(n_rows, n_tokens, *tail)
    out = merge.apply(x)
    torch.testing.assert_close(out.double(), naive_means(merge, x), atol=1e-4, rtol=1e-5)
    assert torch.equal(merge.restore(out, length=n_tokens), gather(out, merge.assign))
    assert torch.equal(merge.apply(merge.restore(out, length=n_tokens)).round(decimals=3), out.round(decimals=3))


@quick
@given(st.data(), st.integers(1, 3), st.integers(1, 9))
def test_two_merges_in_one_are_the_two_in_turn(data, n_rows, n_tokens):
    first = data.draw(merges(n_rows, n_tokens))
    second = data.draw(merges(n_rows, first.index.shape[1]))
    x = numbered(n_rows, n_tokens, 2)
    both = first.then(second)
    torch.testing.assert_close(both.apply(x), second.apply(first.apply(x)), atol=1e-4, rtol=1e-5)
    restored = first.restore(second.restore(second.apply(first.apply(x)), length=first.index.shape[1]), length=n_tokens)
    torch.testing.assert_close(both.restore(both.apply(x), length=n_tokens), restored, atol=1e-4, rtol=1e-5)
    assert torch.equal(both.index, gather(first.index, second.index))


def test_weights_of_a_group_add_up_to_its_size():
    merge = Merge(torch.tensor([[0, 2]]), torch.tensor([[0, 1, 1]]))
    assert merge.sizes().tolist() == [[1.0, 2.0]]
    assert Merge(merge.index, merge.assign, torch.tensor([[1.0, 3.0, 2.0]])).sizes().tolist() == [[1.0, 5.0]]
    with pytest.raises(tokenprune.InputError, match="2 rows"):
        merge.then(Merge(torch.zeros(2, 1).long(), torch.zeros(2, 2).long()))
    with pytest.raises(tokenprune.InputError, match="4 cannot be restored"):
        merge.restore(torch.zeros(1, 2, 3), length=4)
