"""What the launchers launch compiles ahead of time and fits on every architecture; no GPU is needed.

A case calls a launcher with tensors of a user's shapes, as it would be called on an architecture, and records what it
launches. Each of those kernels is compiled with the constants and options that the launcher chose, and may not need
more shared memory than a program has there: where it does, Triton raises when it is launched.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokenprune.ops import Planes, quantize_planes

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # Shared memory of a program by architecture.
MODULES = {path.stem: importlib.import_module(f"tokenprune.kernels.{path.stem}") for path in FOLDER.glob("*.py")}
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Launch(NamedTuple):
    """One launch: the kernel, its arguments by name, and the options of the compiler."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class Recorder:
    """Stands in a kernel's place and writes down its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            arguments = dict(zip(names, args, strict=False)) | {x: y for x, y in kwargs.items() if x in names}
            self.launches.append(Launch(self.kernel, arguments, {x: y for x, y in kwargs.items() if x not in names}))

        return launch


def kernels_of(module: ModuleType) -> dict[str, Any]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    return {name: value for name, value in found.items() if name.endswith("_kernel")}


def launches_of(case: Callable[[], object], kib: int) -> list[Launch]:
    """What a case launches where a program has so much shared memory, without repeats."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES.values():
            if hasattr(module, "shared_memory"):
                patch.setattr(module, "shared_memory", lambda _: kib << 10)
            for name, kernel in kernels_of(module).items():
                patch.setattr(module, name, Recorder(kernel, launches))
        case()
    return list({str(signature_of(one)) + str(one.options) + one.kernel.__name__: one for one in launches}.values())


def signature_of(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Types of the arguments, the constants among them, and which ones are divisible by 16, as Triton finds them."""
    types, constants, aligned = {}, {}, []
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            types[name] = f"*{NAMES[value.dtype]}"
            aligned.append(name)
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            types[name], constants[name] = "constexpr", value
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
    return types, constants, aligned


NAMES = {
    **{BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64", torch.bool: "i1", torch.uint8: "u8"},
    **{torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"},
}


# --- cases ------------------------------------------------------------------------------------------------------------


def importance(width: int, dtype: torch.dtype, seen: str = "", softcap: float | None = None) -> Callable[[], object]:
    """Causal attention importance of a prompt; `seen`: a mask of that kind, with padding, a window and weights."""

    def case() -> None:
        query, key = (torch.empty(2, heads, 300, width, dtype=dtype) for heads in (8, 2))
        mask = torch.empty(2, 1, 300, 300, dtype=torch.bool if seen == "bool" else FP32) if "l" in seen else None
        valid, before = torch.ones(2, 300, dtype=torch.bool) if seen else None, torch.zeros(2, dtype=torch.int64)
        rule = width**-0.5, 1.0, True, 90 if seen == "window" else None, softcap
        MODULES["attention_importance"].launch(query, key, valid, mask, before, *rule, pagerank=bool(seen))

    return case


def decoding(width: int, dtype: torch.dtype, kind: str = "") -> Callable[[], object]:
    """A decoding step; `kind`: plain, with planes read at once, or with all that a step may do."""

    def case() -> None:
        query = torch.zeros(2, 8, 1, width, dtype=dtype)
        key: Any = torch.zeros(2, 2, 3000, width, dtype=dtype)
        key = quantize_planes(key) if kind else key
        assert isinstance(key, Planes) == bool(kind)
        masks: tuple[Any, ...] = (None, None, None)
        if kind == "everything":
            masks = torch.ones(2, 2, 3000) > 0, torch.ones(2, 8) > 0, torch.ones(2, dtype=torch.int64)
        threshold, softcap = (0.1, 50.0) if kind == "everything" else (None, None)
        MODULES["decode_attention"].launch(
            query, key, key, width**-0.5, *masks, threshold, softcap, (132, 64, 132, 64, 512)
        )

    return case


def max_min(dtype: torch.dtype, *, hold: bool) -> Callable[[], object]:
    def case() -> None:
        x, valid = torch.empty(2, 3000, 1024, dtype=dtype), torch.ones(2, 3000, dtype=torch.bool)
        MODULES["max_min_select"].launch(x, valid, 3, memory=1 << 30, hold=hold)

    return case


def match(dtype: torch.dtype, n: int = 577, *, masked: bool = False) -> Callable[[], object]:
    def case() -> None:
        mask = torch.ones(2, n, dtype=torch.bool) if masked else None
        MODULES["bipartite_match"].launch(torch.empty(2, n, 64, dtype=dtype), mask, mask, 16)

    return case


def merge(dtype: torch.dtype, *, weighted: bool = False) -> Callable[[], object]:
    def case() -> None:
        weight = torch.ones(2, 577) if weighted else None
        assign = torch.zeros(2, 577, dtype=torch.int64)
        MODULES["merge_tokens"].launch(torch.empty(2, 577, 1024, dtype=dtype), assign, 500, weight)

    return case


def top_k(dtype: torch.dtype, *, masked: bool = False) -> Callable[[], object]:
    def case() -> None:
        valid, counts = (torch.ones(2, 9000, dtype=torch.bool), [100, 3]) if masked else (None, None)
        MODULES["top_k_select"].launch(torch.empty(2, 9000, dtype=dtype), valid, 100, counts)

    return case


# What is compiled in every run, and for which architectures.
CASES: dict[str, tuple[Callable[[], object], tuple[int, ...]]] = {
    "importance-bf16-128": (importance(128, BF16), (80, 90, 100)),
    "importance-fp16-128": (importance(128, FP16), (75,)),
    "decoding-fp32-256-everything": (decoding(256, FP32, "everything"), (75,)),
    "importance-bf16-64-window": (importance(64, BF16, "window"), (90,)),
    "importance-bf16-256-bool-capped": (importance(256, BF16, "bool", 50.0), (120,)),
    "importance-fp32-128-float": (importance(128, FP32, "float"), (90,)),
    "decoding-bf16-128": (decoding(128, BF16), (80, 100)),
    "decoding-bf16-256-everything": (decoding(256, BF16, "everything"), (90,)),
    "max-min-bf16-held": (max_min(BF16, hold=True), (80, 90)),
    "max-min-fp32-streamed": (max_min(FP32, hold=False), (90,)),
    "match-bf16-masked": (match(BF16, masked=True), (80, 100)),
    "match-fp32-8000": (match(FP32, 8000), (90,)),
    "merge-bf16-weighted": (merge(BF16, weighted=True), (90,)),
    "top-k-bf16-masked": (top_k(BF16, masked=True), (90,)),
}
# The wide matrix: what blocks of importance follow is compiled for every architecture, the rest for one of each kind.
KINDS = (75, 86, 90, 100)
WIDE: dict[str, tuple[Callable[[], object], tuple[int, ...]]] = {
    "importance-bf16-256": (importance(256, BF16), tuple(KIB)),
    "importance-fp16-256-float": (importance(256, FP16, "float"), tuple(KIB)),
}
for size in (64, 80, 128, 256):
    WIDE[f"importance-fp16-{size}"] = importance(size, FP16), tuple(KIB)
for each, size in [(FP16, 64), (FP16, 128), (FP16, 256), (FP32, 128), (FP32, 256)]:
    for what in ("", "planes", "everything"):
        WIDE[f"decoding-{NAMES[each]}-{size}-{what or 'plain'}"] = decoding(size, each, what), KINDS
for each in (FP16, FP32, FP64):
    WIDE |= {
        f"max-min-{NAMES[each]}-held": (max_min(each, hold=True), KINDS),
        f"max-min-{NAMES[each]}-step": (max_min(each, hold=False), KINDS),
        f"match-{NAMES[each]}": (match(each), KINDS),
        f"match-{NAMES[each]}-protected": (match(each, masked=True), KINDS),
        f"merge-{NAMES[each]}": (merge(each), KINDS),
        f"top-k-{NAMES[each]}": (top_k(each), KINDS),
    }


def parameters() -> Iterator[Any]:
    """Cases and architectures, the usual ones and those of the wide matrix."""
    for cases, marks in ((CASES, ()), (WIDE, (pytest.mark.matrix,))):
        for name, (case, architectures) in cases.items():
            for arch in architectures:
                yield pytest.param(case, arch, id=f"{name}-sm_{arch}", marks=marks)


@pytest.mark.parametrize(("case", "arch"), list(parameters()))
def test_what_is_launched_compiles_and_fits(case: Callable[[], object], arch: int) -> None:
    launches = launches_of(case, KIB[arch])
    assert launches
    for launch in launches:
        types, constants, aligned = signature_of(launch)
        attributes = {(launch.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(launch.kernel, types, constants, attributes)
        done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
        assert done.asm["cubin"]
        assert done.metadata.shared <= KIB[arch] << 10, launch.kernel.__name__


@pytest.mark.parametrize("kib", sorted(set(KIB.values())))
def test_blocks_follow_the_shared_memory(kib: int) -> None:
    """A tile that is held, and as many of those that pass by as there are stages, fit in whatever is left of it."""
    blocks_for = MODULES["attention_importance"].blocks_for
    pieces = blocks_for(128, 4, kib << 10)
    assert kib << 10 >= 4 * 32 * 2 * (64 + 64)
    for width in range(1, 257):
        assert blocks_for(width, 4, kib << 10) == blocks_for(width, 8, kib << 10) == pieces
        first, second = blocks_for(width, 2, kib << 10)
        if kib < 99:
            assert (first, second) == pieces
            continue
        sides = first["BLOCK_M"] + first["num_stages"] * first["BLOCK_N"]
        assert 2 * first["BLOCK_D"] * sides <= kib << 10
        assert first["BLOCK_D"] >= width
        assert (second["BLOCK_N"], second["BLOCK_M"]) == (first["BLOCK_M"], first["BLOCK_N"])


@pytest.mark.parametrize("kib", sorted(set(KIB.values())))
def test_blocks_of_a_decoding_step_follow_the_shared_memory(kib: int) -> None:
    """Both halves of a block of fp32 vectors, in two stages."""
    for width in range(1, 257):
        tile = MODULES["decode_attention"].blocks_for(width, 4, kib << 10)
        assert 2 * 2 * 4 * tile["HALF"] * tile["BLOCK"] < kib << 10
        assert tile["HALF"] >= (width + 1) // 2
        assert tile["BLOCK"] >= 16  # The least of a product.


def test_every_kernel_is_launched_by_a_case() -> None:
    launched = {one.kernel.__name__ for case, _ in CASES.values() for one in launches_of(case, KIB[90])}
    assert launched == {name for module in MODULES.values() for name in kernels_of(module)}
