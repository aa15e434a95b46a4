"""Every Triton kernel compiles to a cubin for sm_80, sm_90 and sm_100; no GPU is needed."""

import importlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FOLDER = Path(__file__).resolve().parents[1] / "kernels"

# A case names a kernel, the types of its arguments, its constants and its options; a new kernel needs one here.
Case = tuple[str, dict[str, str], dict[str, Any], dict[str, Any]]


def max_min_select_cases(dtype: str, block: int, block_d: int, warps: int) -> list[Case]:
    """The cases of `kernels/max_min_select.py`, with the constants that its launcher chooses."""
    tokens = {"x": f"*{dtype}", "n_tokens": "i32", "width": "i32", "stride_b": "i64", "stride_n": "i32"}
    scratch = {"inverse": "*fp32", "valid": "*i1", "similarity": "*fp32", "near": "*fp32", "gap": "*fp32"}
    outputs = {
        "best": "*fp32",
        "where": "*i32",
        "order": "*i64",
        "path": "*fp32",
        "n_tiles": "i32",
        "k": "i32",
        "step": "i32",
    }
    types, tile = tokens | scratch | outputs, {"stride_d": 1, "BLOCK": block, "BLOCK_D": block_d}
    return [
        ("_inverse_length_kernel", types, {"stride_d": 1, "BLOCK": 16, "BLOCK_D": 128}, {}),
        ("_similarity_kernel", types, tile | {"HAS_VALID": True, "STORE": True}, {"num_warps": warps}),
        ("_step_kernel", types, tile | {"TILES": 64}, {}),
        ("_start_kernel", types, {"HAS_VALID": True, "BLOCK": block}, {}),
        ("_greedy_kernel", types, {"HAS_VALID": True, "BLOCK": 4096}, {"num_warps": 16}),
    ]


CASES: dict[str, dict[str, list[Case]]] = {
    "max_min_select": {
        "fp32": max_min_select_cases("fp32", 64, 32, 4),
        "bf16": max_min_select_cases("bf16", 128, 64, 8),
        "fp16": max_min_select_cases("fp16", 128, 64, 8)[:3],
        "fp64": max_min_select_cases("fp64", 64, 32, 4)[:3],
    }
}


def parameters() -> list[Any]:
    """One test per file, dtype, kernel and architecture; the rarer dtypes only in the wide matrix."""
    return [
        pytest.param(
            file,
            case,
            arch,
            id=f"{file}-{case[0]}-{dtype}-sm_{arch}",
            marks=[pytest.mark.matrix] * (dtype in ("fp16", "fp64")),
        )
        for file, dtypes in CASES.items()
        for dtype, cases in dtypes.items()
        for case in cases
        for arch in (80, 90, 100)
    ]


@pytest.mark.parametrize(("file", "case", "arch"), parameters())
def test_kernel_compiles(file: str, case: Case, arch: int) -> None:
    name, types, constants, options = case
    kernel = getattr(importlib.import_module(f"tokenprune.kernels.{file}"), name)
    signature = {argument: "constexpr" if argument in constants else types[argument] for argument in kernel.arg_names}
    aligned = [i for i, argument in enumerate(kernel.arg_names) if signature[argument].startswith("*")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"enable_fp_fusion": False} | options
    assert triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]


def test_every_kernel_has_a_case() -> None:
    for path in FOLDER.glob("*.py"):
        module = importlib.import_module(f"tokenprune.kernels.{path.stem}")
        kernels = {
            name for name, value in vars(module).items() if isinstance(value, triton.JITFunction) and "_kernel" in name
        }
        covered = {case[0] for cases in CASES.get(path.stem, {}).values() for case in cases}
        assert kernels == covered, f"kernels/{path.name}: cases are missing or stale in {Path(__file__).name}"
