"""Every Triton kernel compiles to a cubin for sm_80, sm_90 and sm_100; no GPU is needed."""

import importlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FOLDER = Path(__file__).resolve().parents[2] / "kernels"

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


def top_k_select_cases(dtype: str, block: int, *, masked: bool) -> list[Case]:
    """The cases of `kernels/top_k_select.py`, with the constants that its launcher chooses."""
    types = {"scores": f"*{dtype}", "valid": "*i1", "counts": "*i32", "index": "*i64"}
    sizes = {"n_tokens": "i32", "width": "i32", "stride_b": "i32"}
    constants = {"stride_n": 1, "HAS_VALID": masked, "HAS_COUNTS": masked, "BLOCK": block}
    return [("_top_k_kernel", types | sizes, constants, {"num_warps": min(block // 256, 16)})]


def bipartite_match_cases(dtype: str, block_d: int, *, masked: bool) -> list[Case]:
    """The cases of `kernels/bipartite_match.py`, with the constants that its launcher chooses."""
    tokens = {"keys": f"*{dtype}", "n_tokens": "i32", "width": "i32", "stride_b": "i64", "stride_n": "i32"}
    masks = {"order": "*i64", "free": "*i1", "valid": "*i1", "n_before": "*i64", "free_stride": "i32"}
    scratch = {"best": "*fp32", "partner": "*i32", "before": "*i32", "n_sources": "i32", "r": "i32"}
    types = tokens | masks | scratch | {"index": "*i64", "assign": "*i64", "n_groups": "i32"}
    tile = {"stride_d": 1, "BLOCK": 64, "BLOCK_D": block_d, "HAS_ORDER": masked, "HAS_FREE": masked}
    return [
        ("_partner_kernel", types, tile, {}),
        ("_assign_kernel", types, {"HAS_ORDER": masked, "BLOCK": 128}, {}),
        ("_rank_kernel", types, {"BLOCK": 128, "BLOCK_J": 64}, {"num_warps": 4}),
        ("_rank_kernel", types, {"BLOCK": 4096, "BLOCK_J": 2}, {"num_warps": 16}),
    ][: 2 if masked else 4]


def merge_tokens_cases(dtype: str, *, weighted: bool) -> list[Case]:
    """The cases of `kernels/merge_tokens.py`, with the constants that its launcher chooses."""
    tokens = {"x": f"*{dtype}", "weight": "*fp32", "out": f"*{dtype}", "size": "*fp32"}
    groups = {"assign": "*i64", "order": "*i32", "start": "*i32", "count": "*i32"}
    sizes = {"n_tokens": "i32", "n_groups": "i32", "width": "i32", "stride_b": "i64", "stride_n": "i32"}
    types = tokens | groups | sizes
    return [
        ("_order_kernel", types, {"BLOCK": 64, "BLOCK_J": 64}, {}),
        ("_mean_kernel", types, {"stride_d": 1, "HAS_WEIGHT": weighted, "BLOCK": 8, "BLOCK_D": 256}, {}),
    ]


def attention_importance_cases(dtype: str, width: int) -> list[Case]:
    """The cases of `kernels/attention_importance.py`: plain causal ones, and all that a mask and a window add."""
    from tokenprune.kernels.attention_importance import tiles

    tensors = {"query": f"*{dtype}", "key": f"*{dtype}", "valid": "*i1", "before": "*i32"}
    floats = {"lse": "*fp32", "weight": "*fp32", "out": "*fp32", "scale": "fp32", "bias_scale": "fp32", "low": "fp32"}
    integers = ("n_queries", "n_keys", "width", "n_heads", "group", "window", "stride_sb", "stride_sq")
    strides = [f"stride_{side}{axis}" for side in "qk" for axis in "bhn"]
    types = tensors | floats | dict.fromkeys([*integers, *strides], "i32")
    cases = []
    for seen, pointer, masked in ((0, f"*{dtype}", False), (1, "*i1", True), (2, "*fp32", True)):
        kinds = {"CAUSAL": seen == 0, "WINDOW": masked, "SEEN": seen, "HAS_VALID": masked}
        kinds |= {"CAP": 50.0 if seen == 1 else None}
        fixed = kinds | {"stride_qd": 1, "stride_kd": 1, "stride_sk": 1}
        for name, chosen in zip(("_log_sum_exp_kernel", "_column_kernel"), tiles(width, ITEMSIZE[dtype]), strict=True):
            options = {option: chosen[option] for option in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
            tile = {constant: value for constant, value in chosen.items() if constant.isupper()}
            tile |= {"WEIGHTED": masked} if name == "_column_kernel" else {}
            cases.append((name, types | {"seen": pointer}, fixed | tile, options))
    return cases


ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def decode_cases(
    kernel: str, dtype: str, planes: int, *, masked: bool, half: int = 64, cap: float | None = None
) -> list[Case]:
    """The cases of `kernels/decode_logits.py` and `kernels/decode_values.py`, with the constants of their launcher."""
    stored = "u8" if planes else dtype
    tensors = {
        "query": dtype,
        "key": stored,
        "value": stored,
        "low": stored,
        "key_scale": "fp32",
        "value_scale": "fp32",
    }
    floats = dict.fromkeys(("logits", "top", "total", "anchor", "norm", "partial", "scores", "magnitude"), "fp32")
    others = {"valid": "i1", "heads": "i8", "again": "i8", "flat": "i8", "image": "i32", "cut": "i32", "counts": "i32"}
    outputs = {"output": dtype, "read": "i64", "valid_counts": "i64"}
    types = {name: f"*{of}" for name, of in (tensors | floats | others | outputs).items()}
    types |= {"scale": "fp32", "threshold": "fp32"}
    types |= {f"{name}_b": "i64" for name in ("key", "value", "scale", "valid")}
    names = ("n_heads", "length", "split_length", "n_values", "n_splits")
    sizes = ("key_row", "key_low", "value_row", "value_low", "dense_row")
    types |= dict.fromkeys(
        [*names, *sizes, *(f"{x}_{y}" for x in ("key", "value", "scale", "valid") for y in "gn")], "i32"
    )
    tile = {"GROUP": 4, "ROWS": 16, "HALF": half, "BLOCK": 32 if dtype == "fp32" or half > 64 else 64, "PLANES": planes}
    tile |= {"WIDTH": 2 * half, "HAS_VALID": masked, "HAS_HEADS": masked, "CAP": cap}
    settle = {"HAS_HEADS": masked, "DECIDE": planes == 1, "SELECT": masked, "HAS_COUNTS": masked, "SPLITS": 64}
    combine = {"GROUP": 4, "WIDTH": 2 * half, "PADDED": 2 * half, "SPLITS": 64}
    constants = {
        "_logits_kernel": tile | {"AGAIN": False},
        "_settle_kernel": settle | {"BLOCK": 8192},
        "_values_kernel": tile | {"WIDE": dtype == "fp32", "SELECT": masked},
        "_combine_kernel": combine | {"HAS_VALID": masked, "HAS_HEADS": masked},
    }[kernel]
    again = [(kernel, types, constants | {"AGAIN": True}, {})] if kernel == "_logits_kernel" and planes == 1 else []
    return [(kernel, types, constants, {"num_warps": 8} if kernel == "_settle_kernel" else {}), *again]


CASES: dict[str, dict[str, list[Case]]] = {
    "attention_importance": {
        "bf16": [case for width in (64, 128, 256) for case in attention_importance_cases("bf16", width)[:2]]
        + attention_importance_cases("bf16", 80)[2:],
        "fp32": attention_importance_cases("fp32", 128)[::5],
        "fp16": attention_importance_cases("fp16", 128),
        "fp64": attention_importance_cases("fp64", 64)[:2],
    },
    "bipartite_match": {
        "fp32": bipartite_match_cases("fp32", 32, masked=False) + bipartite_match_cases("fp32", 32, masked=True),
        "bf16": bipartite_match_cases("bf16", 64, masked=True),
        "fp16": bipartite_match_cases("fp16", 64, masked=True)[:1],
        "fp64": bipartite_match_cases("fp64", 32, masked=True)[:1],
    },
    "merge_tokens": {
        "fp32": merge_tokens_cases("fp32", weighted=False),
        "bf16": merge_tokens_cases("bf16", weighted=True),
        "fp16": merge_tokens_cases("fp16", weighted=True)[1:],
        "fp64": merge_tokens_cases("fp64", weighted=True)[1:],
    },
    "decode_logits": {
        "fp32": decode_cases("_logits_kernel", "fp32", 0, masked=True)
        + decode_cases("_settle_kernel", "fp32", 1, masked=False)
        + decode_cases("_settle_kernel", "fp32", 0, masked=True),
        "bf16": decode_cases("_logits_kernel", "bf16", 0, masked=False)
        + decode_cases("_logits_kernel", "bf16", 1, masked=True)
        + decode_cases("_logits_kernel", "bf16", 1, masked=True, cap=50.0),
        "fp16": decode_cases("_logits_kernel", "fp16", 0, masked=True)
        + decode_cases("_logits_kernel", "fp16", 2, masked=False, half=128),
    },
    "decode_values": {
        "fp32": decode_cases("_values_kernel", "fp32", 3, masked=True),
        "bf16": decode_cases("_values_kernel", "bf16", 0, masked=False)
        + decode_cases("_values_kernel", "bf16", 3, masked=True)
        + decode_cases("_values_kernel", "bf16", 3, masked=True, cap=50.0)
        + decode_cases("_combine_kernel", "bf16", 0, masked=True),
        "fp16": decode_cases("_values_kernel", "fp16", 1, masked=True)
        + decode_cases("_values_kernel", "fp16", 2, masked=False, half=128)
        + decode_cases("_combine_kernel", "fp16", 0, masked=False),
    },
    "max_min_select": {
        "fp32": max_min_select_cases("fp32", 64, 32, 4),
        "bf16": max_min_select_cases("bf16", 128, 64, 8),
        "fp16": max_min_select_cases("fp16", 128, 64, 8)[:3],
        "fp64": max_min_select_cases("fp64", 64, 32, 4)[:3],
    },
    "top_k_select": {
        "fp32": top_k_select_cases("fp32", 8192, masked=False),
        "bf16": top_k_select_cases("bf16", 8192, masked=True),
        "fp16": top_k_select_cases("fp16", 8192, masked=True),
    },
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
