"""Top-k selection: the torch versions against the naive loop, the Triton version (interpreted) against the torch one.

This file also is the program that runs the Triton cases, in a process of its own that imports Triton to interpret:
`python test_ops_top_k.py CASES RESULTS`.
"""

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
from tokenprune.ops import top_k

SIZES = (1, 2, 63, 197, 577, 2100, 5000)
ENTRIES = (-torch.inf, -1.5, -0.0, 0.0, 2.0**-149, 1.0, 1.0, torch.inf, torch.nan)


def scores(n: int, rows: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed + n)).to(dtype)


def kinds(n: int, rows: int) -> dict[str, torch.Tensor]:
    """Rows of every kind that may make a choice go wrong, `[rows, n]`."""
    x, place = scores(n, rows), torch.randint(len(ENTRIES), (rows, n), generator=torch.Generator().manual_seed(n))
    broken = x.clone()
    broken[:, n // 3 :: 3] = torch.nan
    return {
        "distinct": x,
        "bf16": x.bfloat16(),
        "fp16": x.half(),
        "fp64": x.double(),
        "few": torch.tensor(ENTRIES)[place],
        "equal": torch.full((rows, n), 0.1),
        "nan": torch.full((rows, n), torch.nan),
        "some_nan": broken,
        "sorted": x.sort(1).values,
        "period": x[:, :1].expand(rows, n) + torch.arange(n) % 17,
    }


def naive(x: torch.Tensor, counts: list[int], valid: torch.Tensor | None = None) -> torch.Tensor:
    width = max(counts)
    mask = torch.ones(x.shape, dtype=torch.bool) if valid is None else valid
    rows = zip(x.float().tolist(), counts, mask.tolist(), strict=True)
    chosen = [naive_ops.top_k_select(row, count, inside) for row, count, inside in rows]
    return torch.tensor([row + [-1] * (width - len(row)) for row in chosen])


# --- the torch versions against the naive loop ------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", kinds(1, 1))
def test_torch_follows_the_naive_loop(kind: str, n: int, rows: int) -> None:
    x = kinds(n, rows)[kind]
    for k in {1, max(1, n // 60), max(1, n // 5), (n + 1) // 2, max(1, n - 1), n}:
        got = ops.top_k_select(x, k=k)
        assert got.dtype == torch.int64
        assert torch.equal(got, naive(x, [k] * rows))
        assert torch.equal(top_k._select(x, k, None, None), got)


def test_one_bad_row_does_not_make_up_for_another() -> None:
    x = scores(64, 2)
    x[0, 5], x[1, :33] = torch.nan, 3.0  # One row reaches its threshold too seldom, the other one too often.
    for k in (1, 8, 32):
        assert torch.equal(ops.top_k_select(x, k=k), naive(x, [k, k]))


@pytest.mark.parametrize("n", [70, 5000])
def test_masks_and_counts_of_rows(n: int) -> None:
    x = kinds(n, 4)["few"]
    valid = torch.rand(4, n, generator=torch.Generator().manual_seed(1)) < 0.6
    counts = [0, 1, int(valid[2].sum()), 20]
    for given_as in (counts, tuple(counts), torch.tensor(counts)):
        got = ops.top_k_select(x, k=given_as, valid=valid)
        assert torch.equal(got, naive(x, counts, valid))
    assert torch.equal(top_k._select(x, max(counts), counts, valid), got)
    assert torch.equal(ops.top_k_select(x, k=9, valid=valid), naive(x, [9] * 4, valid))
    assert torch.equal(ops.top_k_select(x, k=[9, 3, 0, 9]), naive(x, [9, 3, 0, 9]))


@pytest.mark.parametrize("n", [70, 5000])
def test_what_is_not_valid_is_not_looked_at(n: int) -> None:
    x, valid = scores(n, 3), torch.arange(n).expand(3, n) % 3 > 0
    want = ops.top_k_select(x, k=n // 3, valid=valid)
    for poison in (torch.nan, torch.inf, 0.0):
        assert torch.equal(ops.top_k_select(x.masked_fill(~valid, poison), k=n // 3, valid=valid), want)
    alone = ops.top_k_select(x[valid].view(3, -1), k=n // 3)
    assert torch.equal(valid[0].nonzero()[:, 0][alone], want)


def test_strides_and_gradients_do_not_matter() -> None:
    x = scores(300, 4).requires_grad_()
    want = ops.top_k_select(x, k=50)
    assert torch.equal(want, naive(x.detach(), [50] * 4))
    for view in (x.t().contiguous().t(), x.repeat_interleave(2, dim=1)[:, ::2], torch.cat([x, x], 1)[:, :300]):
        assert torch.equal(ops.top_k_select(view, k=50), want)


def test_the_scores_are_left_alone() -> None:
    for x in kinds(3000, 2).values():
        before = x.clone()
        ops.top_k_select(x, k=700)
        ops.top_k_select(x[:, :700], k=90)
        assert torch.equal(x.nan_to_num(9), before.nan_to_num(9))


def test_empty_choices() -> None:
    assert ops.top_k_select(torch.empty(0, 5), k=2).shape == (0, 2)
    assert ops.top_k_select(torch.empty(0, 5), k=[]).shape == (0, 0)
    assert ops.top_k_select(torch.ones(2, 5), k=[0, 0]).shape == (2, 0)


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from(ENTRIES), st.booleans()), min_size=1, max_size=40), st.data())
def test_any_row(entries: list[tuple[float, bool]], data: st.DataObject) -> None:
    x, valid = torch.tensor([[value for value, _ in entries]]), torch.tensor([[inside for _, inside in entries]])
    k = data.draw(st.integers(0, int(valid.sum())))
    assert torch.equal(ops.top_k_select(x, k=[k], valid=valid), naive(x, [k], valid))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 6, True, 2.0, None, "2", [3], [3, 6], [3, -1], [3, 1.0], torch.ones(2)])
def test_a_wrong_k_is_refused(k: Any) -> None:
    with pytest.raises(OptionError, match=r"needs an int.* as k"):
        ops.top_k_select(scores(5, 2), k=k)


@pytest.mark.parametrize("x", [torch.ones(5), torch.ones(1, 5).long(), torch.ones(1, 0), torch.ones(1, 5, 2)])
def test_wrong_scores_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"needs scores \[B, N\]"):
        ops.top_k_select(x, k=1)


@pytest.mark.parametrize("valid", [torch.ones(1, 5), torch.ones(5).bool(), torch.ones(1, 4).bool()])
def test_a_wrong_mask_is_refused(valid: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"valid as torch.bool \[1, 5\]"):
        ops.top_k_select(scores(5), k=1, valid=valid)


def test_too_few_valid_scores_are_refused() -> None:
    valid = torch.tensor([[True] * 5, [True, False, True, False, False]])
    with pytest.raises(InputError, match=r"k=3 of row 1, .* only 2 valid"):
        ops.top_k_select(scores(5, 2), k=3, valid=valid)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(OptionError, match="'cuda'"):
        ops.top_k_select(scores(5), k=1, backend="cuda")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs on the CPU here")
def test_triton_on_a_cpu_tensor_is_refused() -> None:
    with pytest.raises(BackendError, match=r"'torch'.* works? here"):
        ops.top_k_select(scores(5), k=1, backend="triton")


# --- the Triton version against the torch version ---------------------------------------------------------------------


def triton_cases() -> dict[str, tuple[torch.Tensor, torch.Tensor | None, Any]]:
    """Scores, mask and k, by name."""
    cases: dict[str, tuple[torch.Tensor, torch.Tensor | None, Any]] = {}
    for n in (1, 2, 63, 577):
        cases |= {f"{kind}-{n}": (x, None, (n + 1) // 2) for kind, x in kinds(n, 2).items()}
    x, valid = kinds(300, 4)["few"], torch.arange(300).expand(4, 300) % 7 < torch.tensor([[1], [3], [5], [7]])
    cases["counts"] = x, None, [300, 0, 7, 120]
    cases["valid"] = x, valid, 40
    cases["valid-counts"] = scores(300, 4), valid, [43, 2, 100, 300]
    cases["strided"] = scores(300, 4).t().contiguous().t(), None, 50
    cases["several-blocks"] = kinds(20000, 1)["few"].round(), None, 9000
    cases["several-blocks-counts"] = scores(17000, 2), torch.arange(17000).expand(2, -1) % 2 > 0, [20, 8400]
    cases["one-of-many"] = torch.zeros(1, 131072).index_fill(1, torch.tensor([131071]), 1.0), None, 2
    return cases


def work(source: str, target: str) -> None:
    """Run every case in Triton, on memory filled with the largest integer."""
    torch.use_deterministic_algorithms(True)
    results = {
        name: ops.top_k_select(x, k=k, valid=v, backend="triton") for name, (x, v, k) in torch.load(source).items()
    }
    torch.save(results, target)


@pytest.fixture(scope="module")
def triton_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    torch.save(triton_cases(), folder / "cases")
    command = [sys.executable, __file__, str(folder / "cases"), str(folder / "results")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results")


@pytest.mark.parametrize("name", triton_cases())
def test_triton_follows_torch(name: str, triton_results: dict[str, torch.Tensor]) -> None:
    x, valid, k = triton_cases()[name]
    assert torch.equal(triton_results[name], ops.top_k_select(x, k=k, valid=valid, backend="torch"))


if __name__ == "__main__":
    work(*sys.argv[1:])
