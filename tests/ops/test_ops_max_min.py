"""Max-min selection: the torch version against the naive loop, the Triton version (interpreted) against the torch one.

Triton has to know that it is to interpret before it is imported, so this file also is the program that runs the Triton
cases in a process of its own: `python test_ops_max_min.py CASES RESULTS`.
"""

import importlib
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
from tokenprune.ops import max_min_search

SIZES = (1, 2, 63, 197, 577)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEMORY = 64 << 20


def features(n: int, dtype: torch.dtype = torch.float32, rows: int = 1, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, n, width, generator=torch.Generator().manual_seed(seed + n)).to(dtype)


@pytest.fixture(params=["held", "lazy", "blockwise"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the similarity held, without it, and without it in blocks of a few tokens."""
    if request.param == "lazy":
        monkeypatch.setattr(
            max_min_search._Cosines, "similarity", property(lambda _: None, lambda *_: None), raising=False
        )
    if request.param == "blockwise":
        monkeypatch.setattr(max_min_search, "MEMORY", 0)
        monkeypatch.setattr(max_min_search, "_BLOCK", 40_000)
    return str(request.param)


@pytest.fixture
def poison():
    """Fills `torch.empty` with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# --- the torch version against the naive loop -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_torch_follows_the_naive_loop(n: int, dtype: torch.dtype, scheme: str, poison: None) -> None:
    x = features(n, dtype)
    for k in {1, max(1, n // 4), min(n, 150)}:
        order, radius = naive_ops.max_min_select(x[0], k)
        got = ops.max_min_select(x, k=k)
        assert got.order[0].tolist() == order
        assert got.index[0].tolist() == sorted(order)
        torch.testing.assert_close(got.radius_path[0], torch.tensor(radius), atol=1e-6, rtol=0)
        assert got.radius[0] == got.radius_path[0, -1]
        assert (got.index.dtype, got.order.dtype, got.radius.dtype) == (torch.int64, torch.int64, torch.float32)


def test_all_tokens_are_chosen_when_k_is_n(scheme: str) -> None:
    got = ops.max_min_select(features(63, rows=2), k=63)
    assert got.index.tolist() == [list(range(63))] * 2
    assert got.radius.tolist() == [0, 0]


def test_strides_do_not_matter(scheme: str) -> None:
    x = features(63, rows=2)
    want = ops.max_min_select(x, k=20)
    shapes = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.repeat_interleave(2, dim=2)[..., ::2],
        torch.cat([x, x], 1)[:, :63],
    ]
    assert all(torch.equal(ops.max_min_select(view, k=20).order, want.order) for view in shapes)
    assert ops.max_min_select(x[:1, :1].expand(3, 9, 24), k=4).order.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("width", [24, 96])
def test_lengths_do_not_matter(width: int, scheme: str) -> None:
    x = features(80, width=width)
    want = ops.max_min_select(x, k=30)
    for reach in (5, 35):  # Powers of two scale without rounding.
        power = torch.randint(-reach, reach, (1, 80, 1), generator=torch.Generator().manual_seed(0))
        assert torch.equal(ops.max_min_select(x * 2.0**power, k=30).order, want.order)


def test_autocast_and_gradients_do_not_reach_the_op() -> None:
    x = features(197).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.max_min_select(x, k=50)
    assert torch.equal(got.order, ops.max_min_select(x.detach(), k=50).order)
    assert not got.radius.requires_grad


# --- ties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_tokens_are_chosen_in_their_order(n: int, value: float, scheme: str) -> None:
    k = max(1, n // 2)
    got = ops.max_min_select(torch.full((1, n, 1000), value), k=k)
    assert got.order[0].tolist() == list(range(k))
    assert got.radius.item() == (1 if value == 0 and k < n else 0)  # A zero vector is at distance 1 of all others.


def test_exact_ties_go_to_the_lowest_index(scheme: str) -> None:
    assert ops.max_min_select(torch.eye(80)[None], k=30).order[0].tolist() == list(range(30))


def test_repeats_come_last_and_in_order(scheme: str) -> None:
    x = features(90, width=1000)
    x = torch.cat([x, x[:, 40:], x[:, :40]], 1)
    order = ops.max_min_select(x, k=120).order[0].tolist()
    assert order == naive_ops.max_min_select(x[0], 120)[0]
    assert sorted(order[:90]) == list(range(90))
    assert order[90:] == list(range(90, 120))


def test_zero_and_infinite_vectors_have_cosine_0() -> None:
    x = features(12)
    x[0, 3], x[0, 5], x[0, 7, 2], x[0, 9] = torch.nan, torch.inf, -torch.inf, 1e30  # Whose square is infinite.
    clean = x.clone()
    clean[0, [3, 5, 7, 9]] = 0
    got, want = ops.max_min_select(x, k=12), ops.max_min_select(clean, k=12)
    assert torch.equal(got.order, want.order)
    assert torch.equal(got.radius_path, want.radius_path)
    assert got.index[0].tolist() == list(range(12))


# --- rows and masks ---------------------------------------------------------------------------------------------------


def ragged() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A batch `[3, 90, 24]` whose rows have 90, 60 and 31 valid tokens among NaN, and those tokens by themselves."""
    x, valid = features(90, rows=3), torch.ones(3, 90, dtype=torch.bool)
    valid[1, ::3] = False
    valid[2, :59] = False
    x[~valid] = torch.nan
    return x, valid, [x[i, valid[i]][None] for i in range(3)]


def test_a_row_in_a_padded_batch_is_the_row_alone(scheme: str, poison: None) -> None:
    x, valid, alone = ragged()
    got = ops.max_min_select(x, k=31, valid=valid)
    for i, row in enumerate(alone):
        want = ops.max_min_select(row, k=31)
        assert torch.equal(got.order[i], valid[i].nonzero()[want.order[0], 0])
        assert torch.equal(got.radius_path[i], want.radius_path[0])


@pytest.mark.parametrize(("n", "width"), [(577, 96), (2100, 96), (577, 9), (301, 33)])
def test_a_row_of_a_batch_is_the_row_alone(n: int, width: int) -> None:
    x = features(n, rows=3, width=width)
    got = ops.max_min_select(x, k=99)
    for i in range(3):
        want = ops.max_min_select(x[i : i + 1], k=99)
        assert torch.equal(got.order[i : i + 1], want.order)
        assert torch.equal(got.radius_path[i : i + 1], want.radius_path)


def test_an_empty_batch_gives_empty_results() -> None:
    assert ops.max_min_select(torch.empty(0, 5, 3), k=2).index.shape == (0, 2)
    assert ops.max_min_cover(torch.empty(0, 5, 3), radius=0.1, max_k=2).order.shape == (0, 0)


# --- cover ------------------------------------------------------------------------------------------------------------


def test_cover_stops_at_the_first_choice_that_reaches_the_radius(scheme: str) -> None:
    x = features(90, rows=2)
    full = ops.max_min_select(x, k=90)
    for radius, min_k, max_k in ((0.3, 1, 90), (0.3, 70, 90), (0.3, 1, 20), (0, 1, 90), (2, 1, 90), (2, 5, 90)):
        got = ops.max_min_cover(x, radius=radius, min_k=min_k, max_k=max_k)
        for i in range(2):
            reached = (full.radius_path[i] <= radius).nonzero()[0].item() + 1
            n = max(min_k, min(max_k, reached))
            assert got.n_kept[i] == n
            assert torch.equal(got.order[i, :n], full.order[i, :n])
            assert (got.order[i, n:] == -1).all()
            assert got.radius[i] == full.radius_path[i, n - 1]
        assert got.order.shape[1] == got.n_kept.max()


def test_cover_never_gives_more_tokens_than_are_valid() -> None:
    x, valid, _ = ragged()
    got = ops.max_min_cover(x, radius=0, max_k=90, valid=valid)
    assert got.n_kept.tolist() == [90, 60, 31]
    assert got.radius.tolist() == [0, 0, 0]


def test_cover_fills_up_to_min_k_with_equal_tokens(scheme: str) -> None:
    got = ops.max_min_cover(torch.ones(1, 70, 1000), radius=0.1, min_k=5, max_k=9)
    assert got.order.tolist() == [[0, 1, 2, 3, 4]]


# --- properties -------------------------------------------------------------------------------------------------------

small = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=n, max_size=n), st.integers(1, n)
    )
)


@settings(max_examples=150, deadline=None, database=None)
@given(small)
def test_properties_of_the_choice(case: tuple[list[list[int]], int]) -> None:
    rows, k = case
    x = torch.tensor(rows, dtype=torch.float32)
    got = ops.max_min_select(x[None], k=k)
    order, index = got.order[0].tolist(), got.index[0].tolist()
    assert len(set(order)) == k
    assert index == sorted(order)
    assert ops.max_min_select(x[None], k=len(x)).order[0, :k].tolist() == order

    distance = naive_ops.cosine_distance(x)
    assert got.radius.item() == pytest.approx(distance[:, order].amin(1).max().item(), abs=1e-6)
    for i in range(1, k):  # Every choice is as far as any other token could have been.
        gap = distance[:, order[:i]].amin(1)
        gap[order[:i]] = -1
        assert gap[order[i]] >= gap.max() - 1e-6
    # Greedy is within twice the optimum in the chord, which is a metric and the square root of twice this distance.
    optimum = min(distance[:, list(best)].amin(1).max().item() for best in itertools.combinations(range(len(x)), k))
    assert (2 * got.radius.item()) ** 0.5 <= 2 * (2 * optimum) ** 0.5 + 1e-3


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(call: Any) -> int:
    """The most that torch's allocator held for a call at once, from the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize(
    ("n", "width", "dtype"),
    [(8192, 1024, torch.bfloat16), (8192, 64, torch.float32), (3900, 200, torch.float16), (300, 20000, torch.bfloat16)],
)
def test_memory_is_bounded(n: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, n, width).to(dtype)
    valid = torch.arange(n)[None] % 97 > 0
    assert peak_bytes(lambda: ops.max_min_select(x, k=n // 64, valid=valid)) <= max(MEMORY, x.nbytes)


def test_the_memory_test_sees_a_similarity() -> None:
    assert peak_bytes(lambda: torch.empty(4097, 4097)) > MEMORY


def test_memory_of_the_triton_version_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("tokenprune.kernels.max_min_select")

    class Skipped:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: None

    for module in (kernel, importlib.import_module("tokenprune.kernels.cosine")):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Skipped())
    for n, width, rows, dtype in (
        (8192, 1024, 3, torch.bfloat16),
        (2880, 1024, 5, torch.float32),
        (4096, 8, 2, torch.half),
    ):
        x = torch.empty(rows, n, width, dtype=dtype)
        assert peak_bytes(lambda x=x, n=n: kernel.launch(x, None, n // 4, memory=MEMORY)) <= max(MEMORY, x.nbytes)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 6, True, 2.0, None])
def test_a_wrong_k_is_refused(k: Any) -> None:
    with pytest.raises(OptionError, match="from 1 to 5 as k"):
        ops.max_min_select(features(5), k=k)


@pytest.mark.parametrize("x", [torch.ones(5, 3), torch.ones(1, 5, 3).long(), torch.ones(1, 5, 0), torch.ones(1, 0, 3)])
def test_wrong_features_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"needs features \[B, N, D\]"):
        ops.max_min_select(x, k=1)


@pytest.mark.parametrize(
    "valid", [torch.ones(1, 5), torch.ones(5, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)]
)
def test_a_wrong_mask_is_refused(valid: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"valid as torch.bool \[1, 5\]"):
        ops.max_min_select(features(5), k=1, valid=valid)


def test_too_few_valid_tokens_are_refused() -> None:
    valid = torch.tensor([[True] * 5, [True, False, True, False, False]])
    with pytest.raises(InputError, match="row 1 has only 2 valid"):
        ops.max_min_select(features(5, rows=2), k=3, valid=valid)


@pytest.mark.parametrize(
    "options", [{"radius": -0.1}, {"radius": 3}, {"radius": True}, {"min_k": 4}, {"max_k": 9}, {"min_k": 0}]
)
def test_wrong_options_of_cover_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ops.max_min_cover(features(5), **({"radius": 0.1, "max_k": 3} | options))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(OptionError, match="'cuda'"):
        ops.max_min_select(features(5), k=1, backend="cuda")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs on the CPU here")
def test_triton_on_a_cpu_tensor_is_refused() -> None:
    with pytest.raises(BackendError, match=r"'torch'.* works? here"):
        ops.max_min_select(features(5), k=1, backend="triton")


def test_importing_the_ops_imports_no_kernel() -> None:
    code = "import sys, tokenprune.ops; sys.exit('tokenprune.kernels.max_min_select' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 0


# --- the Triton version against the torch version ---------------------------------------------------------------------


def triton_cases() -> dict[str, tuple[torch.Tensor, torch.Tensor | None, int]]:
    """Features, mask and k, by name."""
    kinds = [(n, torch.float32) for n in SIZES] + [(n, dtype) for n in (63, 197) for dtype in DTYPES[1:]]
    cases = {f"{n}-{str(dtype)[6:]}": (features(n, dtype), None, min(n, 9)) for n, dtype in kinds}
    x, valid, _ = ragged()
    cases["ragged"] = x, valid, 12
    repeated = torch.cat([features(70), features(70)], 1)
    cases["repeats"] = repeated, None, 90
    cases["strided"] = features(63, rows=2).transpose(1, 2).contiguous().transpose(1, 2), None, 20
    cases["equal"] = torch.full((1, 130, 300), 0.1), None, 8
    cases["zero"] = torch.zeros(1, 65, 3), None, 8
    cases["ties"] = torch.eye(70)[None], None, 9
    cases["all"] = features(20, torch.float64, rows=2), None, 20
    broken = features(12)
    broken[0, 3], broken[0, 5] = torch.nan, torch.inf
    cases["broken"] = broken, None, 12
    return cases


def cover_of(x: torch.Tensor, valid: torch.Tensor | None, k: int, backend: str) -> ops.MaxMinCover:
    return ops.max_min_cover(x, radius=0.4, max_k=x.shape[1] // 2 + 1, min_k=min(k, 3), valid=valid, backend=backend)


def work(source: str, target: str) -> None:
    """Run every case in Triton, with the similarity held and without, on memory filled with NaN."""
    torch.use_deterministic_algorithms(True)
    kernel = importlib.import_module("tokenprune.kernels.max_min_select")
    launch, results = kernel.launch, {}
    for name, (x, valid, k) in torch.load(source).items():
        for hold in (False, True):
            # No memory is allowed: rows are launched one by one. Few choices where each is a launch that Python runs.
            kernel.launch = lambda *args, hold=hold, memory: launch(*args, hold=hold, memory=0)
            short = k if hold or len(x[0]) < 30 else min(k, 5)
            results[name, hold] = tuple(ops.max_min_select(x, k=short, valid=valid, backend="triton"))
        if name in ("ragged", "63-float32"):
            results[name, "cover"] = tuple(cover_of(x, valid, k, "triton"))
    torch.save(results, target)


@pytest.fixture(scope="module")
def triton_results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[torch.Tensor, ...]]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    torch.save(triton_cases(), folder / "cases")
    command = [sys.executable, __file__, str(folder / "cases"), str(folder / "results")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results")


@pytest.mark.parametrize("hold", [True, False], ids=["held", "streamed"])
@pytest.mark.parametrize("name", triton_cases())
def test_triton_follows_torch(name: str, hold: bool, triton_results: dict[Any, tuple[torch.Tensor, ...]]) -> None:
    x, valid, _ = triton_cases()[name]
    got = ops.MaxMinSelection(*triton_results[name, hold])
    want = ops.max_min_select(x, k=got.order.shape[1], valid=valid, backend="torch")
    assert torch.equal(got.order, want.order)
    assert torch.equal(got.index, want.index)
    torch.testing.assert_close(got.radius, want.radius, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.radius_path, want.radius_path, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["ragged", "63-float32"])
def test_triton_covers_as_torch_does(name: str, triton_results: dict[Any, tuple[torch.Tensor, ...]]) -> None:
    got, want = ops.MaxMinCover(*triton_results[name, "cover"]), cover_of(*triton_cases()[name], "torch")
    assert torch.equal(got.order, want.order)
    assert torch.equal(got.n_kept, want.n_kept)
    torch.testing.assert_close(got.radius, want.radius, atol=1e-6, rtol=0)


if __name__ == "__main__":
    work(*sys.argv[1:])
