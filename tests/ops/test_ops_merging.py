"""Matching and merging: the torch versions against the naive loops, the Triton versions (interpreted) against torch.

Triton has to know that it is to interpret before it is imported, so this file also is the program that runs the Triton
cases in a process of its own: `python test_ops_merging.py CASES RESULTS`.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import naive_ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune import ops
from tokenprune.errors import BackendError, InputError, OptionError
from tokenprune.ops import merging

SIZES = (1, 2, 63, 197, 577)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def keys(n: int, dtype: torch.dtype = torch.float32, rows: int = 1, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, n, width, generator=torch.Generator().manual_seed(seed + n)).to(dtype)


def mask(*shape: int, share: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def same_as_naive(
    got: ops.BipartiteMatch, x: torch.Tensor, protected: torch.Tensor | None = None, valid: torch.Tensor | None = None
) -> None:
    r = x.shape[1] - got.index.shape[1]
    for i, row in enumerate(x):
        safe = None if protected is None else protected.expand(x.shape[:2])[i].tolist()
        index, assign = naive_ops.bipartite_match(row, r, safe, None if valid is None else valid[i].tolist())
        assert got.index[i].tolist() == index
        assert got.assign[i].tolist() == assign


@pytest.fixture
def poison():
    """Fills `torch.empty` with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# --- matching: the torch version against the naive loop ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_matching_follows_the_naive_loop(n: int, dtype: torch.dtype, poison: None) -> None:
    x = keys(n, dtype, rows=2)
    for r in {0, n // 16, n // 3, (n + 1) // 2 if n > 1 else 0}:
        got = ops.bipartite_match(x, r=r)
        same_as_naive(got, x)
        assert (got.index.dtype, got.assign.dtype, got.index.shape) == (torch.int64, torch.int64, (2, n - r))


@pytest.mark.parametrize("n", SIZES[2:])
def test_matching_with_masks_follows_the_naive_loop(n: int) -> None:
    x, valid = keys(n, rows=3), mask(3, n, share=0.8)
    for protected in (mask(n, share=0.1), mask(3, n, share=0.1), torch.arange(n) < 5):
        same_as_naive(ops.bipartite_match(x, r=n // 5, protected=protected), x, protected)
        got = ops.bipartite_match(x, r=n // 5, protected=protected, valid=valid)
        same_as_naive(got, x, protected, valid)
    same_as_naive(ops.bipartite_match(x, r=n // 5, valid=valid), x, valid=valid)


def test_blocks_of_the_similarity_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, protected = keys(197, rows=2), torch.arange(197) < 1
    want = ops.bipartite_match(x, r=40, protected=protected)
    monkeypatch.setattr(merging, "_BLOCK", 10_000)
    got = ops.bipartite_match(x, r=40, protected=protected)
    assert torch.equal(got.assign, want.assign)


def test_no_reduction_is_the_identity() -> None:
    got = ops.bipartite_match(keys(9, rows=2), r=0, protected=torch.ones(9, dtype=torch.bool))
    assert got.index.tolist() == got.assign.tolist() == [list(range(9))] * 2


def test_groups_stand_at_their_destination() -> None:
    x = torch.eye(6)[None]
    x[0, 4] = x[0, 1] * 3 + 0.1  # Merges into position 1, which is before it.
    got = ops.bipartite_match(x, r=1)
    assert got.index.tolist() == [[0, 1, 2, 3, 5]]
    assert got.assign.tolist() == [[0, 1, 2, 3, 1, 4]]


def test_a_protected_token_keeps_its_place_in_the_count() -> None:
    x = torch.ones(1, 6, 4)
    got = ops.bipartite_match(x, r=2, protected=torch.tensor([True, True, False, False, False, False]))
    assert got.index.tolist() == [[0, 1, 3, 5]]  # 2 and 4 are still sources, 3 is the first destination.
    assert got.assign.tolist() == [[0, 1, 2, 2, 2, 3]]


def test_strides_do_not_matter() -> None:
    x = keys(63, rows=2)
    want = ops.bipartite_match(x, r=20)
    views = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.repeat_interleave(2, dim=2)[..., ::2],
        torch.cat([x, x], 1)[:, :63],
    ]
    assert all(torch.equal(ops.bipartite_match(view, r=20).assign, want.assign) for view in views)


def test_autocast_and_gradients_do_not_reach_the_matching() -> None:
    x = keys(197).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.bipartite_match(x, r=50)
    assert torch.equal(got.assign, ops.bipartite_match(x.detach(), r=50).assign)


# --- matching: ties and rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("n", SIZES[1:])
def test_equal_tokens_merge_in_their_order(n: int, value: float) -> None:
    r = max(1, n // 4)
    got = ops.bipartite_match(torch.full((1, n, 1000), value), r=r)
    gone = list(range(0, 2 * r, 2))
    assert got.index[0].tolist() == [i for i in range(n) if i not in gone]
    assert got.assign[0, gone].tolist() == [0] * r  # Position 1 is the first to stay.


def test_exact_ties_go_to_the_lowest_position() -> None:
    same_as_naive(ops.bipartite_match(torch.eye(80)[None], r=30), torch.eye(80)[None])


@pytest.mark.parametrize("width", [24, 64, 1000])
def test_repeated_tokens_tie(width: int) -> None:
    x = keys(120, width=width)
    x = torch.cat([x, x, x[:, :70]], 1)
    same_as_naive(ops.bipartite_match(x, r=100), x)


def test_zero_and_infinite_vectors_have_cosine_0() -> None:
    x = keys(40)
    x[0, 2], x[0, 5], x[0, 7, 2], x[0, 8] = torch.nan, torch.inf, -torch.inf, 1e30  # Whose square is infinite.
    clean = x.clone()
    clean[0, [2, 5, 7, 8]] = 0
    assert torch.equal(ops.bipartite_match(x, r=20).assign, ops.bipartite_match(clean, r=20).assign)


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(0, 10_000), st.integers(4, 60), st.integers(1, 3))
def test_a_row_does_not_depend_on_its_batch_or_padding(seed: int, n: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-spread, spread + 1, (3, n, 5), generator=generator).float()  # Few values, so many ties.
    valid = mask(3, n, share=0.7, seed=seed)
    valid[:, :4] = True
    protected = mask(3, n, share=0.1, seed=seed + 1)
    protected[:, 1:3] = False
    got = ops.bipartite_match(x, r=1, protected=protected, valid=valid)
    for i in range(3):
        place = valid[i].nonzero()[:, 0]
        alone = ops.bipartite_match(x[i : i + 1, place], r=1, protected=protected[i : i + 1, place])
        target, alone_target = got.index[i][got.assign[i]], place[alone.index[0][alone.assign[0]]]
        assert torch.equal(target[place], alone_target)
        assert torch.equal(target[~valid[i]], (~valid[i]).nonzero()[:, 0])
        assert not ((target != torch.arange(n)) & protected[i]).any()
        assert not protected[i][target[target != torch.arange(n)]].any()


# --- matching: memory -------------------------------------------------------------------------------------------------


def peak_bytes(call: Any) -> int:
    """The most that torch's allocator held for a call at once, from the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def test_memory_is_bounded() -> None:
    x = keys(6000, width=8)
    assert peak_bytes(lambda: torch.empty(3000, 3000)) > 32 << 20
    assert peak_bytes(lambda: ops.bipartite_match(x, r=900, protected=torch.arange(6000) < 1)) < 12 << 20


# --- merging ----------------------------------------------------------------------------------------------------------


def groups(n: int, rows: int, share: float, seed: int = 0) -> tuple[torch.Tensor, int]:
    """A random assignment in which no group is empty, `[rows, n]`, and the number of groups."""
    m = max(1, round(n * share))
    generator = torch.Generator().manual_seed(seed + n)
    assign = torch.cat([torch.arange(m).expand(rows, m), torch.randint(m, (rows, n - m), generator=generator)], 1)
    return assign.gather(1, torch.rand(rows, n, generator=generator).argsort(1)), m


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("n", SIZES)
def test_merging_follows_the_naive_loop(n: int, dtype: torch.dtype, poison: None) -> None:
    x, weight = keys(n, dtype, rows=2), torch.rand(2, n) + 0.5
    for share in (1.0, 0.9, 0.3, 0.0):
        assign, m = groups(n, 2, share)
        for w in (None, weight):
            got = ops.merge_tokens(x, assign, n_out=m, weight=w)
            assert (got.tokens.dtype, got.size.dtype) == (dtype, torch.float32)
            for i in range(2):
                want, size = naive_ops.merge_tokens(x[i], assign[i].tolist(), m, None if w is None else w[i].tolist())
                epsilon = max(torch.finfo(dtype).eps, 1e-7)
                torch.testing.assert_close(got.tokens[i].double(), want, atol=4 * epsilon, rtol=2 * epsilon)
                torch.testing.assert_close(got.size[i], torch.tensor(size), atol=0, rtol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_token_by_itself_is_copied(dtype: torch.dtype) -> None:
    x = keys(40, dtype, rows=2)
    x[:, 3], x[:, 4], x[:, 5] = -0.0, torch.inf, torch.nan
    assign, m = groups(34, 2, 0.5)
    assign = torch.cat([torch.arange(m, m + 6).expand(2, 6), assign], 1)
    got = ops.merge_tokens(x, assign, n_out=m + 6, weight=torch.rand(2, 40) + 0.5)
    want = x[:, :6].contiguous()
    torch.testing.assert_close(got.tokens[:, m:], want, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(got.tokens[:, m:].signbit()[~want.isnan()], want.signbit()[~want.isnan()])
    assert got.tokens[:, :m].isfinite().all()


def test_merging_does_not_depend_on_strides_or_batch() -> None:
    x, weight = keys(63, rows=3), torch.rand(3, 63) + 0.5
    assign, m = groups(63, 3, 0.4)
    want = ops.merge_tokens(x, assign, n_out=m, weight=weight)
    for view in (x.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([x, x], 2)[..., :24]):
        got = ops.merge_tokens(view, assign.t().contiguous().t(), n_out=m, weight=weight.t().contiguous().t())
        assert torch.equal(got.tokens, want.tokens)
        assert torch.equal(got.size, want.size)
    for i in range(3):
        alone = ops.merge_tokens(x[i : i + 1], assign[i : i + 1], n_out=m, weight=weight[i : i + 1])
        assert torch.equal(alone.tokens[0], want.tokens[i])


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_merging(weighted: bool) -> None:
    x, weight = keys(30, rows=2).requires_grad_(), torch.rand(2, 30) + 0.5
    weight = weight if weighted else torch.ones(2, 30)
    assign, m = groups(30, 2, 0.5)
    slope = torch.randn(2, m, 24)
    (ops.merge_tokens(x, assign, n_out=m, weight=weight).tokens * slope).sum().backward()
    share = (assign[:, None] == torch.arange(m)[:, None]) * weight[:, None]
    share = share / share.sum(2, keepdim=True)
    torch.testing.assert_close(x.grad, share.transpose(1, 2) @ slope)


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(0, 10_000), st.integers(2, 40))
def test_rounds_of_merging_keep_the_sum(seed: int, n: int) -> None:
    """What ToMe relies on: with sizes carried along, every mean is one over the original tokens."""
    x = keys(n, torch.float64, rows=2, seed=seed)
    tokens, size = x, torch.ones(2, n)
    source = torch.arange(n).expand(2, n)
    while tokens.shape[1] > 1:
        r = max(1, tokens.shape[1] // 3)
        match = ops.bipartite_match(tokens, r=r)
        tokens, size = ops.merge_tokens(tokens, match.assign, n_out=tokens.shape[1] - r, weight=size)
        source = match.assign.gather(1, source)
        for i in range(2):
            assert torch.equal(size[i], torch.bincount(source[i]).float())
    torch.testing.assert_close(tokens[:, 0], x.mean(1), atol=1e-6, rtol=0)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [-1, True, 2.0, None, torch.tensor(1)])
def test_a_wrong_r_is_refused(r: Any) -> None:
    with pytest.raises(OptionError, match="int of at least 0 as r"):
        ops.bipartite_match(keys(5), r=r)


@pytest.mark.parametrize(
    ("n", "r", "options", "possible"),
    [
        (1, 1, {}, 0),
        (5, 4, {}, 3),
        (6, 3, {"protected": torch.tensor([True, False, False, False, False, False])}, 2),
        (6, 1, {"protected": torch.tensor([False, True, False, True, False, True])}, 0),
        (6, 2, {"valid": torch.tensor([[True, False, True, True, False, False]])}, 2),
        (6, 1, {"valid": torch.zeros(1, 6, dtype=torch.bool)}, 0),
    ],
)
def test_too_large_an_r_is_refused(n: int, r: int, options: dict[str, Any], possible: int) -> None:
    if possible:
        ops.bipartite_match(keys(n), r=possible, **options)
    with pytest.raises(InputError, match=rf"only {possible} that may.* at most {possible} here"):
        ops.bipartite_match(keys(n), r=max(r, possible + 1), **options)


def test_the_row_that_is_too_short_is_named() -> None:
    valid = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    with pytest.raises(InputError, match="row 1 has only 2"):
        ops.bipartite_match(keys(6, rows=2), r=3, valid=valid)


@pytest.mark.parametrize("x", [torch.ones(5, 3), torch.ones(1, 5, 3).long(), torch.ones(1, 5, 0), torch.ones(1, 0, 3)])
def test_wrong_tokens_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"needs keys \[B, N, D\]"):
        ops.bipartite_match(x, r=1)
    with pytest.raises(InputError, match=r"needs x \[B, N, D\]"):
        ops.merge_tokens(x, torch.zeros(1, 5, dtype=torch.int64), n_out=1)


@pytest.mark.parametrize("wrong", [torch.ones(1, 5), torch.ones(4, dtype=torch.bool), torch.ones(2, 5) > 0])
@pytest.mark.parametrize("name", ["protected", "valid"])
def test_a_wrong_mask_is_refused(name: str, wrong: torch.Tensor) -> None:
    with pytest.raises(InputError, match=rf"needs {name} as torch.bool"):
        ops.bipartite_match(keys(5), r=1, **{name: wrong})


@pytest.mark.parametrize("n_out", [0, 6, True, 2.0])
def test_a_wrong_number_of_groups_is_refused(n_out: Any) -> None:
    with pytest.raises(OptionError, match="from 1 to 5 as n_out"):
        ops.merge_tokens(keys(5), torch.zeros(1, 5, dtype=torch.int64), n_out=n_out)


@pytest.mark.parametrize(
    ("assign", "message"),
    [
        (torch.zeros(1, 5), "assign as torch.int64"),
        (torch.zeros(1, 4, dtype=torch.int64), "assign as torch.int64"),
        (torch.tensor([[0, 1, 2, 3, 3]]), "got 0 to 3"),
        (torch.tensor([[0, 1, -1, 2, 2]]), "got -1 to 2"),
        (torch.tensor([[0, 2, 2, 2, 2]]), "group 1 of row 0 has none"),
    ],
)
def test_a_wrong_assignment_is_refused(assign: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.merge_tokens(keys(5), assign, n_out=3)


@pytest.mark.parametrize("weight", [torch.ones(1, 4), torch.ones(5), torch.ones(1, 5).long()])
def test_wrong_weights_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"weight as floats \[1, 5\]"):
        ops.merge_tokens(keys(5), torch.arange(5)[None], n_out=5, weight=weight)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs on the CPU here")
def test_backends_that_cannot_run_are_refused() -> None:
    for call in (
        lambda backend: ops.bipartite_match(keys(5), r=1, backend=backend),
        lambda backend: ops.merge_tokens(keys(5), torch.arange(5)[None], n_out=5, backend=backend),
    ):
        with pytest.raises(OptionError, match="'cuda'"):
            call("cuda")
        with pytest.raises(BackendError, match=r"'torch'.* works? here"):
            call("triton")


# --- the Triton versions against the torch versions -------------------------------------------------------------------

Matching = tuple[torch.Tensor, int, torch.Tensor | None, torch.Tensor | None]


def matching_cases() -> dict[str, Matching]:
    """Keys, r, protected and valid tokens, by name."""
    kinds = [(n, torch.float32) for n in SIZES] + [(n, dtype) for n in (63, 197) for dtype in DTYPES[1:]]
    cases: dict[str, Matching] = {
        f"{n}-{str(dtype)[6:]}": (keys(n, dtype, rows=2), n // 3 if n > 2 else n - 1, None, None) for n, dtype in kinds
    }
    x = keys(150, rows=3)
    cases["protected"] = x, 40, mask(150, share=0.1), None
    cases["protected-rows"] = x, 40, mask(3, 150, share=0.1), None
    cases["valid"] = x, 40, None, mask(3, 150, share=0.8)
    cases["both"] = x, 30, mask(150, share=0.1), mask(3, 150, share=0.8)
    cases["none"] = x, 0, None, None
    cases["most"] = x, 75, None, None
    repeated = torch.cat([keys(70, width=100)] * 2, 1)
    cases["repeats"] = repeated, 60, None, None
    cases["strided"] = keys(63, rows=2).transpose(1, 2).contiguous().transpose(1, 2), 20, None, None
    cases["equal"] = torch.full((1, 131, 300), 0.1), 40, None, None
    cases["zero"] = torch.zeros(1, 65, 3), 8, None, None
    cases["ties"] = torch.eye(140)[None], 50, None, None
    cases["wide"] = keys(20, torch.float64, rows=2, width=130), 9, None, None
    broken = keys(40)
    broken[0, 2], broken[0, 5], broken[0, 7, 2], broken[0, 8] = torch.nan, torch.inf, -torch.inf, 1e30
    cases["broken"] = broken, 20, None, None
    return cases


Merging = tuple[torch.Tensor, torch.Tensor, int, torch.Tensor | None]


def merging_cases() -> dict[str, Merging]:
    """Tokens, groups, their number and weights, by name."""
    cases: dict[str, Merging] = {}
    for n, dtype in [(n, torch.float32) for n in SIZES] + [(63, dtype) for dtype in (*DTYPES[1:], torch.float64)]:
        x, weight = keys(n, dtype, rows=2), torch.rand(2, n, generator=torch.Generator().manual_seed(n)) + 0.5
        for share in (1.0, 0.8, 0.0):
            cases[f"{n}-{str(dtype)[6:]}-{share}"] = x, *groups(n, 2, share), weight if share < 1 else None
    x = keys(63, rows=2, width=300)
    cases["wide"] = x, *groups(63, 2, 0.5), None
    cases["strided"] = x.transpose(1, 2).contiguous().transpose(1, 2), *groups(63, 2, 0.5), None
    broken = x.clone()
    broken[:, 3], broken[:, 4], broken[:, 5] = -0.0, torch.inf, torch.nan
    cases["broken"] = broken, *groups(63, 2, 0.7), None
    return cases


def work(source: str, target: str) -> None:
    """Run every case in Triton, on memory filled with NaN."""
    torch.use_deterministic_algorithms(True)
    matching, merging_ = torch.load(source)
    results: dict[Any, tuple[torch.Tensor, ...]] = {}
    for name, (x, r, protected, valid) in matching.items():
        match = ops.bipartite_match(x, r=r, protected=protected, valid=valid, backend="triton")
        results["match", name] = tuple(match)
    for name, (x, assign, n_out, weight) in merging_.items():
        merged = ops.merge_tokens(x, assign, n_out=n_out, weight=weight, backend="triton")
        results["merge", name] = tuple(merged)
    torch.save(results, target)


@pytest.fixture(scope="module")
def triton_results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[torch.Tensor, ...]]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    torch.save((matching_cases(), merging_cases()), folder / "cases")
    command = [sys.executable, __file__, str(folder / "cases"), str(folder / "results")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results")


@pytest.mark.parametrize("name", matching_cases())
def test_triton_matches_as_torch_does(name: str, triton_results: dict[Any, tuple[torch.Tensor, ...]]) -> None:
    x, r, protected, valid = matching_cases()[name]
    got = ops.BipartiteMatch(*triton_results["match", name])
    want = ops.bipartite_match(x, r=r, protected=protected, valid=valid, backend="torch")
    assert torch.equal(got.assign, want.assign)
    assert torch.equal(got.index, want.index)


@pytest.mark.parametrize("name", merging_cases())
def test_triton_merges_as_torch_does(name: str, triton_results: dict[Any, tuple[torch.Tensor, ...]]) -> None:
    x, assign, n_out, weight = merging_cases()[name]
    got = ops.MergedTokens(*triton_results["merge", name])
    want = ops.merge_tokens(x, assign, n_out=n_out, weight=weight, backend="torch")
    assert torch.equal(got.size, want.size)
    # The interpreter cuts bf16 off where a GPU rounds; all else is the same arithmetic in the same order.
    tolerance = torch.finfo(torch.bfloat16).eps if x.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(got.tokens, want.tokens, atol=0, rtol=tolerance, equal_nan=True)


def test_importing_the_ops_imports_no_kernel() -> None:
    code = "import sys, tokenprune.ops; sys.exit('tokenprune.kernels.bipartite_match' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 0


if __name__ == "__main__":
    work(*sys.argv[1:])
