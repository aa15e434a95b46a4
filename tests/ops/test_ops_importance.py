"""Attention importance: the torch version against whole attention matrices, the interpreted Triton version against it.

Triton has to know that it is to interpret before it is imported, so this file also is the program that runs the Triton
cases in a process of its own: `python test_ops_importance.py CASES RESULTS`.
"""

import itertools
import os
import subprocess
import sys
from typing import Any

import naive_ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune import ops
from tokenprune.errors import BackendError, InputError, OptionError
from tokenprune.ops import attention_rows

REDUCTIONS = ("column_sum", "last_query", "pagerank")
SIZES = (1, 2, 63, 197, 577)
MEMORY = 64_000_000


def heads(
    n_keys: int,
    *,
    rows: int = 1,
    n_queries: int | None = None,
    n_heads: int = 4,
    n_key_heads: int = 2,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys."""
    random = torch.Generator().manual_seed(n_keys)
    query = torch.randn(rows, n_heads, n_queries or n_keys, width, generator=random)
    return query.to(dtype), torch.randn(rows, n_key_heads, n_keys, width, generator=random).to(dtype)


def sees(n_queries: int, n_keys: int, *, causal: bool = True, window: int | None = None) -> torch.Tensor:
    """`[Lq, Lk]`, by the words of the docstring."""
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool)
    for i, j in itertools.product(range(n_queries), range(n_keys)):
        position = i + n_keys - n_queries
        seen[i, j] = not (causal and j > position) and not (window is not None and position - j >= window)
    return seen


def importance(query: torch.Tensor, key: torch.Tensor, **options: Any) -> torch.Tensor:
    return ops.attention_importance(query, key, **({"scale": query.shape[3] ** -0.5} | options))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal to 1e-5 of the value, and of the mean score for keys that get next to nothing; a NaN equals a NaN."""
    assert got.dtype == torch.float32
    slack = 1e-5 * max(want.nan_to_num().mean().item(), 1e-6)
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=slack, equal_nan=True)


@pytest.fixture(params=["usual", "blockwise"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the usual blocks and with blocks of few queries, of which few are held."""
    if request.param == "blockwise":
        monkeypatch.setattr(attention_rows, "BLOCK", 3000)
        monkeypatch.setattr(attention_rows, "QUERIES", 7)
        monkeypatch.setattr(attention_rows, "HELD", 4 * 9000)
    return str(request.param)


@pytest.fixture
def poison():
    """Fills `torch.empty` with NaN, so that memory that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# --- the torch version against whole matrices -------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", SIZES)
def test_torch_follows_the_whole_matrix(n: int, dtype: torch.dtype, reduction: str, blocks: str, poison: None) -> None:
    query, key = heads(n, dtype=dtype)
    want = naive_ops.attention_importance(query[0], key[0], sees(n, n), 24**-0.5, reduction)
    assert_close(importance(query, key, reduction=reduction)[0], want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options",
    [{"causal": False}, {"window": 1}, {"window": 5}, {"window": 90}, {"window": 30, "causal": False}],
    ids=str,
)
def test_what_is_seen(options: dict[str, Any], reduction: str, blocks: str) -> None:
    query, key = heads(63)
    want = naive_ops.attention_importance(query[0], key[0], sees(63, 63, **options), 24**-0.5, reduction)
    assert_close(importance(query, key, reduction=reduction, **options)[0], want)


@pytest.mark.parametrize("reduction", ["column_sum", "last_query"])
@pytest.mark.parametrize("window", [None, 9, 50])
@pytest.mark.parametrize("n_queries", [1, 20, 62])
def test_queries_are_the_last_positions(n_queries: int, window: int | None, reduction: str, blocks: str) -> None:
    query, key = heads(63, n_queries=n_queries)
    seen = sees(n_queries, 63, window=window)
    want = naive_ops.attention_importance(query[0], key[0], seen, 24**-0.5, reduction)
    assert_close(importance(query, key, reduction=reduction, window=window)[0], want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("n_heads", "n_key_heads", "width"), [(1, 1, 1), (3, 3, 80), (6, 2, 256), (8, 1, 64)])
def test_grouped_heads_and_widths(n_heads: int, n_key_heads: int, width: int, reduction: str, blocks: str) -> None:
    query, key = heads(50, n_heads=n_heads, n_key_heads=n_key_heads, width=width)
    want = naive_ops.attention_importance(query[0], key[0], sees(50, 50), width**-0.5, reduction)
    assert_close(importance(query, key, reduction=reduction)[0], want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_temperature_divides_the_logits(reduction: str) -> None:
    query, key = heads(63)
    assert_close(
        importance(query, key, reduction=reduction, temperature=0.5),
        importance(query, key, reduction=reduction, scale=2 * 24**-0.5),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [0.3, 2, 50.0])
@pytest.mark.parametrize("n_queries", [1, 63])
def test_a_soft_cap_bounds_the_logits(n_queries: int, softcap: float, reduction: str, blocks: str) -> None:
    query, key = heads(63, n_queries=63 if reduction == "pagerank" else n_queries)
    seen = sees(query.shape[2], 63)
    want = naive_ops.attention_importance(query[0], 3 * key[0], seen, 24**-0.5, reduction, softcap)
    assert_close(importance(query, 3 * key, reduction=reduction, softcap=softcap)[0], want)
    warm = importance(query, 3 * key, reduction=reduction, softcap=softcap, temperature=0.5)
    wider = importance(query, 3 * key, reduction=reduction, softcap=2 * softcap, scale=2 * 24**-0.5)
    assert_close(warm, wider)  # c tanh(x / c) / T = (c / T) tanh((x / T) / (c / T))


def test_large_logits_do_not_overflow() -> None:
    query, key = heads(63)
    total = {r: importance(query * 100, key * 100, reduction=r, temperature=0.1).sum().item() for r in REDUCTIONS}
    assert total["column_sum"] == pytest.approx(4 * 63, rel=1e-5)
    assert total["last_query"] == pytest.approx(1, rel=1e-5)
    assert 1 - 1e-5 <= total["pagerank"] <= 2  # Of 4 heads that each sum to 1.


def test_strides_and_autocast_and_gradients_do_not_matter(blocks: str) -> None:
    query, key = heads(63, rows=2)
    for reduction in REDUCTIONS:
        want = importance(query, key, reduction=reduction)
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (query, key)]
        spread = [x.repeat_interleave(2, 3)[..., ::2] for x in (query, key)]
        for views in (turned, spread):
            with torch.autocast("cpu", torch.bfloat16):
                got = importance(*views, reduction=reduction)
            assert_close(got, want)
            assert not got.requires_grad


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "inf", "lowest"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_seen_replaces_causal_and_window(reduction: str, kind: str, blocks: str) -> None:
    query, key = heads(63, rows=2)
    seen = torch.rand(2, 1, 63, 63, generator=torch.Generator().manual_seed(0)) > 0.8
    seen |= torch.eye(63, dtype=torch.bool)
    want = [naive_ops.attention_importance(query[i], key[i], seen[i, 0], 24**-0.5, reduction) for i in range(2)]
    low = -torch.inf if kind == "inf" else torch.finfo(torch.float32).min
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill_(~seen, low)
    got = importance(query, key, reduction=reduction, seen=mask, causal=False, window=3)
    assert_close(got, torch.stack(want))
    one = importance(query, key, reduction=reduction, seen=mask[:1])
    assert_close(one[1], naive_ops.attention_importance(query[1], key[1], seen[0, 0], 24**-0.5, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_float_seen_is_added_to_the_logits(reduction: str, blocks: str) -> None:
    query, key = heads(63)
    size = torch.arange(1, 64)
    wide = key.repeat_interleave(size, 2)  # As many copies of a key as its size says.
    bias = size.log().expand(1, 1, 63, 63)
    seen = torch.ones(1, 1, 63, wide.shape[2], dtype=torch.bool)
    if reduction == "pagerank":  # Needs as many queries as keys: the rule itself says what one more step does.
        once = importance(query, key, seen=bias + 1, reduction=reduction)
        assert_close(once, importance(query, key, seen=bias, reduction=reduction))
        return
    want = importance(query, wide, seen=seen, reduction=reduction)[0]
    assert_close(
        importance(query, key, seen=bias, reduction=reduction)[0],
        torch.stack([part.sum() for part in want.split(size.tolist())]),
    )


def test_queries_that_see_nothing_contribute_nothing(blocks: str) -> None:
    query, key = heads(63)
    seen = sees(63, 63)[None, None].clone()
    seen[:, :, 20:40] = False
    got = importance(query, key, seen=seen)
    assert got.sum().item() == pytest.approx(4 * 43, rel=1e-5)
    seen[:, :, -1] = False
    assert not importance(query, key, seen=seen, reduction="last_query").any()
    assert importance(query, key, seen=seen, reduction="pagerank").isfinite().all()
    assert not importance(query, key, seen=torch.zeros_like(seen)).any()
    assert not importance(query, key, seen=torch.zeros_like(seen), reduction="pagerank").any()


def ragged(n_queries: int = 63) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four rows: whole, padded left, with gaps, and all padding; what is padding is NaN."""
    query, key = heads(63, rows=4, n_queries=n_queries)
    valid = torch.ones(4, 63, dtype=torch.bool)
    valid[1, :21] = False
    valid[2, 5::3] = False
    valid[3] = False
    key = key.masked_fill(~valid[:, None, :, None], torch.nan)
    return query.masked_fill(~valid[:, None, 63 - n_queries :, None], torch.nan), key, valid


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("n_queries", [63, 30])
def test_a_row_in_a_padded_batch_is_the_row_alone(
    n_queries: int, window: int | None, reduction: str, blocks: str, poison: None
) -> None:
    if reduction == "pagerank" and n_queries < 63:
        pytest.skip("page-rank needs all queries")
    query, key, valid = ragged(n_queries)
    got = importance(query, key, valid=valid, window=window, reduction=reduction)
    assert not got[~valid].any()
    for i in range(3):
        rows, columns = valid[i, 63 - n_queries :], valid[i]
        seen = sees(n_queries, 63, window=window)[rows][:, columns]  # Distances count what lies between.
        alone = naive_ops.attention_importance(query[i][:, rows], key[i][:, columns], seen, 24**-0.5, reduction)
        assert_close(got[i, columns], alone)
        mask = sees(n_queries, 63, window=window)[None, None]
        assert_close(importance(query, key, valid=valid, seen=mask, reduction=reduction), got)


def test_no_valid_query_gives_zeros() -> None:
    query, key = heads(63, n_queries=5)
    valid = torch.arange(63)[None] < 58
    assert not importance(query, key, valid=valid).any()
    assert not importance(query, key, valid=valid, reduction="last_query").any()


def test_an_empty_batch_gives_empty_results() -> None:
    assert importance(torch.empty(0, 4, 5, 8), torch.empty(0, 2, 5, 8)).shape == (0, 5)


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**9 - 1), st.integers(0, 10**6))
def test_properties(n: int, group: int, mask: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    query, key = torch.randn(1, 2 * group, n, 3, generator=random), torch.randn(1, 2, n, 3, generator=random)
    valid = torch.tensor([[bool(mask >> i & 1) for i in range(n)]])
    n_valid = int(valid.sum())
    total = {r: importance(query, key, valid=valid, reduction=r).sum().item() for r in REDUCTIONS}
    assert total["column_sum"] == pytest.approx(2 * group * n_valid, rel=1e-5)
    assert total["last_query"] == pytest.approx(float(n_valid > 0), rel=1e-5)
    assert total["pagerank"] >= (n_valid > 0) * (1 - 1e-5)  # A root mean square is at least the mean, which sums to 1.


# --- what is not finite -----------------------------------------------------------------------------------------------

BAD = (torch.nan, torch.inf, -torch.inf)
KINDS = ("causal", "window", "capped", "seen")


def broken(bad: float, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Queries, keys and `valid` of seven rows, and options of `kind`.

    Of the rows, two have no `bad` but in padding; one each has it in a query and in a key in the middle, in the last
    key, in the last query, and in a middle key and query whose products are all infinite and of one sign.
    """
    query, key = heads(41, rows=7)
    valid = torch.ones(7, 41, dtype=torch.bool)
    valid[1, :15] = False
    query[1, :, :15], key[1, :, :15] = bad, bad
    query[2, 3, 20, 3] = bad
    key[3, 0, 20, 3] = bad
    key[4, 1, 40, 0] = bad
    query[5, 0, 40, 23] = bad
    query[6], key[6] = query[6].abs(), key[6].abs()
    query[6, :, 20, 1], key[6, :, 21, 1] = bad, bad
    options: dict[str, dict[str, Any]] = {
        "causal": {},
        "window": {"window": 7},
        "capped": {"softcap": 0.5},
        "seen": {"seen": sees(41, 41)[None, None] & (torch.arange(41) != 20)},
    }
    return query, key, valid, options[kind]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_is_told_where_it_counts(bad: float, kind: str, reduction: str, blocks: str) -> None:
    query, key, valid, options = broken(bad, kind)
    got = importance(query, key, valid=valid, reduction=reduction, **options)
    seen = options["seen"][0, 0] if kind == "seen" else sees(41, 41, window=options.get("window"))
    for i in range(7):
        part = valid[i]
        alone = naive_ops.attention_importance(
            query[i][:, part], key[i][:, part], seen[part][:, part], 24**-0.5, reduction, options.get("softcap")
        )
        assert_close(got[i, part], alone)
    assert not got[~valid].any()
    told = got.isnan().any(1).tolist()
    assert told[:2] == [False, False]
    if reduction != "last_query":
        assert told[2:] == [True, kind != "seen", True, True, True]
    else:
        assert told[2:] == [False, kind in ("causal", "capped"), True, True, kind != "window"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("n_queries", [1, 5])
def test_no_softmax_hides_an_infinite_logit(n_queries: int, bad: float, softcap: float | None, reduction: str) -> None:
    n_queries = 6 if reduction == "pagerank" else n_queries
    query, key, valid = torch.ones(1, 2, n_queries, 1), torch.ones(1, 2, 6, 1), torch.arange(6)[None] > 1
    options: dict[str, Any] = {"valid": valid, "softcap": softcap, "reduction": reduction}
    assert torch.equal(importance(query, key, **options) > 0, valid)
    key[0, 1, 3] = bad
    assert torch.equal(importance(query, key, **options).isnan(), valid)
    assert importance(query, key, **options)[0, 0] == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_in_a_float_seen_is_told(bad: float, reduction: str, blocks: str) -> None:
    query, key = heads(41, rows=2)
    valid = torch.ones(2, 41, dtype=torch.bool)
    valid[0, :20] = False
    bias = torch.zeros(1, 1, 41, 41).masked_fill(~sees(41, 41), -torch.inf)
    want = importance(query, key, valid=valid, seen=bias, reduction=reduction)
    bias[0, 0, 15, 7] = bad  # Padding of the first row, and not the last query of the second.
    got = importance(query, key, valid=valid, seen=bias, reduction=reduction)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].isnan(), torch.full((41,), reduction != "last_query"))
    bias[0, 0, 40, 30] = bad
    assert torch.equal(importance(query, key, valid=valid, seen=bias, reduction=reduction).isnan(), valid)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(call: Any) -> int:
    """The most that torch's allocator held for a call at once, from the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("n_heads", "n_key_heads"), [(2, 2), (8, 1)])
def test_memory_is_bounded(n_heads: int, n_key_heads: int, reduction: str) -> None:
    """Heads come one group after the other, so two of them hold what 32 do."""
    query, key = heads(4096, n_heads=n_heads, n_key_heads=n_key_heads, width=16, dtype=torch.bfloat16)
    valid = torch.arange(4096)[None] > 40
    assert peak_bytes(lambda: importance(query, key, valid=valid, reduction=reduction)) <= MEMORY


def test_memory_for_many_heads_and_masks_is_bounded() -> None:
    query, key = heads(4096, n_heads=32, n_key_heads=32, width=128, dtype=torch.bfloat16)
    for seen in (None, torch.zeros(1, 1, 1, 4096, dtype=torch.bfloat16)):
        last = query[:, :, -1:] if seen is not None else query
        assert (
            peak_bytes(lambda last=last, seen=seen: importance(last, key, seen=seen, reduction="last_query")) <= MEMORY
        )


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"scale": torch.nan}, {"scale": "1"}, {"temperature": 0}, {"temperature": -1.0}, {"temperature": True},
     {"window": 0}, {"window": 2.0}, {"window": True}, {"reduction": "sum"},
     {"softcap": 0}, {"softcap": torch.inf}, {"softcap": True}, {"backend": "cuda"}],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        importance(*heads(5), **options)


@pytest.mark.parametrize(
    ("query", "key"),
    [
        (torch.ones(2, 5, 3), torch.ones(2, 5, 3)),
        (torch.ones(1, 3, 5, 3), torch.ones(1, 2, 5, 3)),
        (torch.ones(1, 2, 6, 3), torch.ones(1, 2, 5, 3)),
        (torch.ones(1, 2, 5, 3), torch.ones(1, 2, 5, 4)),
        (torch.ones(2, 2, 5, 3), torch.ones(1, 2, 5, 3)),
        (torch.ones(1, 2, 0, 3), torch.ones(1, 2, 5, 3)),
        (torch.ones(1, 2, 5, 3).half(), torch.ones(1, 2, 5, 3)),
        (torch.ones(1, 2, 5, 3).int(), torch.ones(1, 2, 5, 3).int()),
    ],
)
def test_wrong_queries_and_keys_are_refused(query: torch.Tensor, key: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"needs query \[B, H, Lq, K\] and key \[B, Hkv, Lk, K\]"):
        ops.attention_importance(query, key, scale=1)


@pytest.mark.parametrize("valid", [torch.ones(1, 5), torch.ones(5) > 0, torch.ones(1, 4) > 0])
def test_a_wrong_valid_is_refused(valid: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"valid as torch.bool \[1, 5\]"):
        importance(*heads(5), valid=valid)


@pytest.mark.parametrize("seen", [torch.ones(1, 1, 5, 5).int(), torch.ones(5, 5), torch.ones(1, 4, 5, 5) > 0])
def test_a_wrong_seen_is_refused(seen: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"seen as torch.bool or floats \[1, 1, 5, 5\]"):
        importance(*heads(5), seen=seen)


def test_pagerank_of_fewer_queries_is_refused() -> None:
    with pytest.raises(InputError, match="'column_sum' and 'last_query' work here"):
        importance(*heads(5, n_queries=3), reduction="pagerank")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs on the CPU here")
def test_triton_on_a_cpu_tensor_is_refused() -> None:
    with pytest.raises(BackendError, match=r"'torch'.* works? here"):
        importance(*heads(5), backend="triton")


# --- the Triton version against the torch version ---------------------------------------------------------------------


def triton_cases() -> dict[str, tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """Queries, keys and options, by name."""
    cases: dict[str, tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = {
        f"{n}-{reduction}": (*heads(n), {"reduction": reduction})
        for n, reduction in itertools.product((1, 2, 63, 197), REDUCTIONS)
    }
    cases["577"] = *heads(577, n_heads=1, n_key_heads=1), {}
    cases["577-window"] = *heads(577, n_heads=1, n_key_heads=1), {"window": 100, "reduction": "pagerank"}
    for width, dtype in ((64, torch.bfloat16), (80, torch.float16), (128, torch.bfloat16), (256, torch.float16)):
        cases[f"{width}"] = *heads(150, width=width, dtype=dtype), {}
        cases[f"{width}-last"] = *heads(150, width=width, dtype=dtype), {"reduction": "last_query"}
        cases[f"{width}-capped"] = *heads(150, width=width, dtype=dtype), {"softcap": 0.5, "temperature": 0.7}
    cases["fp64"] = *heads(63, width=80, dtype=torch.float64), {"temperature": 0.1}
    query, key = heads(63, rows=2, n_key_heads=1)
    cases["strided"] = query.transpose(1, 2).contiguous().transpose(1, 2), key.repeat_interleave(2, 3)[..., ::2], {}
    for reduction in REDUCTIONS:
        cases[f"ragged-{reduction}"] = *ragged()[:2], {"reduction": reduction, "valid": ragged()[2]}
        cases[f"whole-{reduction}"] = *heads(100), {"reduction": reduction, "causal": False, "temperature": 0.5}
        seen = torch.rand(2, 1, 80, 80, generator=torch.Generator().manual_seed(0)) > 0.9
        seen[:, :, 20:30] = False
        cases[f"seen-{reduction}"] = *heads(80, rows=2), {"reduction": reduction, "seen": seen}
        bias = torch.randn(1, 1, 80, 80, generator=torch.Generator().manual_seed(0)).masked_fill(~seen[:1], -torch.inf)
        cases[f"bias-{reduction}"] = *heads(80, rows=2), {"reduction": reduction, "seen": bias, "temperature": 0.5}
    for n_queries, window in ((1, None), (70, None), (70, 40), (150, 1)):
        options = {"window": window}
        cases[f"last{n_queries}-{window}"] = *heads(150, n_queries=n_queries, dtype=torch.bfloat16), options
    for bad, reduction, kind in itertools.product(BAD, REDUCTIONS, KINDS):
        query, key, valid, options = broken(bad, kind)
        cases[f"{bad}-{kind}-{reduction}"] = query, key, options | {"valid": valid, "reduction": reduction}
    for bad, reduction in itertools.product(BAD[:2], REDUCTIONS):
        bias = torch.zeros(1, 1, 41, 41).masked_fill(~sees(41, 41), -torch.inf)
        bias[0, 0, 15, 7] = bad
        cases[f"{bad}-bias-{reduction}"] = *heads(41, rows=7), {"valid": valid, "seen": bias, "reduction": reduction}
    query, key, valid = ragged(30)
    cases["ragged-last30"] = query, key, {"valid": valid & (torch.arange(63) < 60), "reduction": "last_query"}
    cases["none-valid"] = *heads(63, n_queries=5), {"valid": torch.arange(63)[None] < 58, "reduction": "last_query"}
    return cases


def work(source: str, target: str) -> None:
    """Run every case in Triton, on memory filled with NaN."""
    torch.use_deterministic_algorithms(True)
    cases = torch.load(source)
    results = {name: importance(q, k, backend="triton", **options) for name, (q, k, options) in cases.items()}
    try:
        importance(*heads(5, width=300), backend="triton")
    except BackendError as error:
        results["error"] = str(error)
    torch.save(results, target)


@pytest.fixture(scope="module")
def triton_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    torch.save(triton_cases(), folder / "cases")
    command = [sys.executable, __file__, str(folder / "cases"), str(folder / "results")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results")


@pytest.mark.parametrize("name", triton_cases())
def test_triton_follows_torch(name: str, triton_results: dict[str, Any]) -> None:
    query, key, options = triton_cases()[name]
    assert_close(triton_results[name], importance(query, key, backend="torch", **options))


def test_heads_too_wide_for_triton_are_refused(triton_results: dict[str, Any]) -> None:
    assert "at most 256 wide, 'torch' and 'auto' work here" in triton_results["error"]


if __name__ == "__main__":
    work(*sys.argv[1:])
