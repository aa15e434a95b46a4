"""Decode attention: the torch version against the naive loop, the Triton version (interpreted) against the torch one.

This file also is the program that runs the Triton cases, in a process of its own that imports Triton to interpret:
`python test_ops_decode.py CASES RESULTS`.
"""

import os
import subprocess
import sys
from typing import Any

import naive_ops
import pytest
import torch

from tokenprune import ops
from tokenprune.errors import BackendError, InputError, OptionError

Case = tuple[tuple[Any, ...], dict[str, Any]]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(
    *, batch: int = 2, n_heads: int = 4, groups: int = 2, length: int = 37, width: int = 16,
    dtype: torch.dtype = torch.float32, planes: str = "", sharp: float = 1.0, broken: str = "", bad: float = torch.nan,
    **options: Any,
) -> Case:  # fmt: skip
    """Arguments of a call; `planes` names what is quantized, `sharp` scales the logits of every second head.

    `broken` names what holds the number `bad`, in the first row and the last head, and of keys and values in the last.
    """
    query = normal(batch, n_heads, 1, width)
    query[:, ::2] *= sharp
    key, value = (normal(batch, groups, length, width, seed=seed).to(dtype) for seed in (1, 2))
    for name, x in (("q", query), ("k", key), ("v", value)):
        if name in broken:
            x[0, -1, -1, 3] = bad
    quantized = [ops.quantize_planes(x) if name in planes else x for name, x in (("k", key), ("v", value))]
    return (query.to(dtype), *quantized), {"scale": width**-0.5} | options


def unread() -> Case:
    """A call whose heads read the first five values; the later ones are NaN, and one is infinite."""
    (query, key, value), options = case(n_values=5)
    key = -torch.arange(37.0)[:, None].expand_as(key)
    value[:, :, 5:], value[:, :, 6] = torch.nan, torch.inf
    return (query.abs(), key, value), options


def mask(*shape: int, share: float = 0.7) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) < share


BF16, FP16 = torch.bfloat16, torch.float16
RAGGED = torch.arange(37) >= torch.tensor([[0], [20]])
EVERYTHING: dict[str, Any] = {"planes": "kv", "threshold": 0.3, "sharp": 4.0, "n_values": 9, "heads": mask(2, 4)}
BROKEN: dict[str, dict[str, Any]] = {
    "broken": {"valid": RAGGED},
    "broken-capped": {"softcap": 0.7},
    "broken-pruned": {"heads": torch.tensor([True, True, True, False])},
    "broken-planes": {"planes": "kv", "threshold": 0.3, "sharp": 4.0},
}
CASES: dict[str, Case] = {
    "plain": case(),
    "one-key": case(length=1),
    "one-head": case(n_heads=1, groups=1, length=130),
    "no-groups": case(groups=4),
    "one-group": case(n_heads=6, groups=1),
    "odd-width": case(width=21),
    "wide": case(width=256, length=70),
    "bf16": case(dtype=BF16),
    "fp16": case(dtype=FP16, width=64, length=300),
    "ragged": case(valid=RAGGED),
    "valid-by-head": case(valid=mask(2, 2, 37)),
    "none-valid": case(valid=RAGGED & torch.tensor([[True], [False]])),
    "heads": case(heads=torch.tensor([True, False, False, False]), valid=RAGGED),
    "heads-by-row": case(heads=torch.tensor([[True, True, False, True], [False] * 4])),
    "values": case(n_values=5),
    "values-by-row": case(n_values=torch.tensor([1, 30]), valid=RAGGED),
    "more-values-than-keys": case(n_values=1000, valid=RAGGED),
    "values-heads-bf16": case(dtype=BF16, n_values=7, heads=torch.tensor([True, True, False, True])),
    "planes": case(planes="kv"),
    "planes-bf16": case(planes="kv", dtype=BF16, valid=RAGGED),
    "planes-fp16": case(planes="kv", dtype=FP16, width=64),
    "high-only": case(planes="kv", threshold=0.0),
    "both-always": case(planes="kv", threshold=1.0),
    "progressive": case(planes="kv", threshold=0.3, sharp=4.0),
    "progressive-keys": case(planes="k", threshold=0.3, sharp=4.0, valid=RAGGED),
    "planes-of-values": case(planes="v", n_values=9),
    "everything": case(**EVERYTHING, valid=mask(2, 2, 37)),
    "everything-longer": case(**EVERYTHING, length=300, width=64, valid=mask(2, 300)),
    "everything-bf16": case(**EVERYTHING, length=300, width=96, groups=1, dtype=BF16),
    "cap": case(softcap=0.7, valid=RAGGED),
    "cap-int": case(softcap=2, length=130, sharp=20.0),
    "cap-none-valid": case(softcap=0.7, valid=RAGGED & torch.tensor([[True], [False]])),
    "cap-bf16": case(softcap=1.0, dtype=BF16, sharp=4.0, width=64, length=300),
    "cap-heads-values": case(softcap=0.7, sharp=4.0, valid=RAGGED, n_values=5, heads=mask(2, 4)),
    "cap-planes": case(softcap=0.7, planes="kv", sharp=4.0, valid=RAGGED),
    "cap-high-only": case(softcap=0.7, planes="kv", sharp=4.0, threshold=0.0),
    "cap-progressive": case(softcap=2.0, planes="kv", sharp=4.0, threshold=0.1),
    "cap-progressive-keys": case(softcap=2.0, planes="k", sharp=4.0, threshold=0.12, valid=RAGGED),
    "cap-everything": case(**EVERYTHING | {"threshold": 0.1}, softcap=2.0, valid=mask(2, 2, 37)),
    "cap-everything-bf16": case(**EVERYTHING | {"threshold": 0.02}, softcap=2.0, length=300, width=96, dtype=BF16),
    "unread": unread(),
    **{
        f"{name}-{broken}-{bad}": case(broken=broken, bad=bad, **options)
        for name, options in BROKEN.items()
        for broken in "qkv"
        for bad in (torch.nan, torch.inf, -torch.inf)
    },
}


def levels(x: torch.Tensor | ops.Planes) -> list[torch.Tensor]:
    """A coarse and a fine version of keys or values."""
    if isinstance(x, torch.Tensor):
        return [x, x]
    return [ops.dequantize_planes(x, low=False), ops.dequantize_planes(x)]


def row_bytes(x: torch.Tensor | ops.Planes, *, fine: bool) -> int:
    if isinstance(x, torch.Tensor):
        return x.shape[-1] * x.element_size()
    return x.shape[-1] // 2 * (1 + fine) + 4


def naive(arguments: tuple[Any, ...], options: dict[str, Any]) -> ops.DecodedStep:
    """`decode_attention`, head by head."""
    query, key, value = arguments
    batch, n_heads, _, width = query.shape
    groups, length = key.shape[1:3]
    valid, heads = options.get("valid"), options.get("heads")
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    valid = (valid[:, None] if valid.ndim == 2 else valid).expand(batch, groups, length)
    heads = (torch.ones(n_heads, dtype=torch.bool) if heads is None else heads).expand(batch, n_heads)
    n_values, threshold = options.get("n_values"), options.get("threshold")
    output, scores = torch.zeros(batch, n_heads, 1, width).double(), torch.zeros(batch, length).double()
    flat = torch.zeros(batch, n_heads, dtype=torch.bool)
    read_bytes = torch.zeros(2, batch, groups, dtype=torch.int64)
    for b in range(batch):
        count = n_values[b].item() if isinstance(n_values, torch.Tensor) else n_values
        for g in range(groups):
            read: dict[int, bool] = {}
            members = [h for h in range(n_heads) if h // (n_heads // groups) == g and heads[b, h]]
            for h in members:
                stored = [[x[b, g] for x in levels(whole)] for whole in (key, value)]
                found = naive_ops.decode_attention(
                    query[b, h, 0], *stored, options["scale"], valid[b, g].tolist(), count, threshold,
                    options.get("softcap"),
                )  # fmt: skip
                output[b, h, 0], flat[b, h] = found[0], found[2]
                scores[b] += found[1]
                for j in found[3]:
                    read[j] = read.get(j, False) or found[2] or threshold is None
            if members:
                fine = threshold is None or bool(flat[b, members].any())
                read_bytes[0, b, g] = int(valid[b, g].sum()) * row_bytes(key, fine=fine)
            read_bytes[1, b, g] = sum(row_bytes(value, fine=fine) for fine in read.values())
    dense = valid.sum(-1) * 2 * width * query.element_size()
    return ops.DecodedStep(output, scores, output.abs().sum((2, 3)), flat, *read_bytes, dense)


def error(arguments: tuple[Any, ...], *, triton: bool) -> float:
    """What rounding may cost: of the output to its dtype, and in Triton of probabilities to the dtype of the values."""
    dtype = arguments[0].dtype
    if triton and dtype != torch.float32 and isinstance(arguments[2], ops.Planes):
        dtype = BF16
    return {BF16: 2.0**-7 if triton else 2.0**-8, FP16: 2.0**-9 if triton else 2.0**-10}.get(dtype, 1e-5)


def assert_same(got: ops.DecodedStep, want: ops.DecodedStep, error: float) -> None:
    """Equal counts and flags; outputs and what is summed from them within `error` of the largest entry or, above 1, of
    each."""
    for name in ("recomputed", "key_bytes", "value_bytes", "dense_bytes"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name, slack in (("output", error), ("magnitude", 16 * error), ("scores", 1e-5)):
        torch.testing.assert_close(
            getattr(got, name).double(),
            getattr(want, name).double(),
            atol=slack,
            rtol=slack,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# --- the torch version against the naive loop -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_torch_follows_the_naive_loop(name: str) -> None:
    arguments, options = CASES[name]
    got = ops.decode_attention(*arguments, **options)
    assert (got.output.dtype, got.scores.dtype, got.magnitude.dtype) == (
        arguments[0].dtype,
        torch.float32,
        torch.float32,
    )
    assert got.output.shape == arguments[0].shape
    assert_same(got, naive(arguments, options), error(arguments, triton=False))


def test_the_cases_differ_in_what_they_are_for() -> None:
    for name in (name for name in CASES if not name.startswith("broken")):
        found = ops.decode_attention(*CASES[name][0], **CASES[name][1])
        if "progressive" in name or "everything" in name:
            assert found.recomputed.any()
            assert not found.recomputed.all()
        if "cap" in name:
            uncapped = ops.decode_attention(*CASES[name][0], **CASES[name][1] | {"softcap": None})
            assert (found.output - uncapped.output).abs().max() > 0.05


def test_plain_attention_is_sdpa() -> None:
    arguments, options = case(length=200, width=64)
    want = torch.nn.functional.scaled_dot_product_attention(*arguments, enable_gqa=True)
    torch.testing.assert_close(ops.decode_attention(*arguments, **options).output, want)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("n_values", [None, 5])
def test_a_bias_is_added_to_the_logits_under_their_cap(n_values: int | None, softcap: float | None) -> None:
    (query, key, value), options = case(groups=4, valid=RAGGED, sharp=3.0)
    bias = mask(2, 37, share=0.3) * 4.0
    found = ops.decode_attention(query, key, value, **options, bias=bias, n_values=n_values, softcap=softcap)
    logits = (query @ key.transpose(2, 3))[:, :, 0] * options["scale"]
    logits = logits if softcap is None else (logits / softcap).tanh() * softcap
    weight = (logits + bias[:, None]).masked_fill(~RAGGED[:, None], -torch.inf).softmax(-1)
    least = 0 if n_values is None else weight.topk(n_values).values[..., -1:]
    torch.testing.assert_close(found.scores, weight.sum(1))
    torch.testing.assert_close(found.output[:, :, 0], ((weight * (weight >= least))[:, :, None] @ value)[:, :, 0])


def test_a_bias_chooses_between_planes_too() -> None:
    (query, key, value), options = case(planes="kv", threshold=0.5, batch=1)
    assert ops.decode_attention(query, key, value, **options).recomputed.all()
    bias = torch.zeros(1, 37)
    bias[0, 7] = 9.0
    found = ops.decode_attention(query, key, value, **options, bias=bias)
    assert not found.recomputed.any()
    assert bool((found.scores[0, 7] > 3.9).all())


def test_a_bias_that_does_not_fit_or_is_for_triton_is_refused() -> None:
    arguments, options = CASES["plain"]
    for bias in (torch.zeros(2, 36), torch.zeros(2, 37, dtype=torch.int64), torch.zeros(37)):
        with pytest.raises(InputError, match=r"bias.*\[2, 37\]"):
            ops.decode_attention(*arguments, **options, bias=bias)
    with pytest.raises(BackendError, match="bias"):
        ops.decode_attention(*arguments, **options, bias=torch.zeros(2, 37), backend="triton")


@pytest.mark.parametrize("softcap", [1e5, 1e12])
def test_a_cap_far_above_the_logits_changes_nothing(softcap: float) -> None:
    arguments, options = CASES["everything"]
    assert_same(ops.decode_attention(*arguments, **options, softcap=softcap), naive(arguments, options), 1e-5)


def test_a_cap_far_below_the_logits_leaves_their_order() -> None:
    query, value = torch.ones(1, 1, 1, 6), torch.eye(6)[None, None]
    key = (40 + 40 * torch.arange(6.0))[:, None].expand_as(value)
    found = ops.decode_attention(query, key, value, scale=1.0, n_values=2, softcap=1.0)
    assert found.output.flatten().tolist() == pytest.approx([0, 0, 0, 0, 1 / 6, 1 / 6])


def test_equal_logits_are_read_from_the_lowest_index() -> None:
    query, key, value = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 6, 2), torch.eye(6, 2)[None, None]
    value[0, 0, :, 0] = 2.0 ** torch.arange(6)
    got = ops.decode_attention(query, key, value, scale=1.0, n_values=3)
    assert got.output[0, 0, 0, 0].item() == pytest.approx((1 + 2 + 4) / 6)  # Not renormalized either.


@pytest.mark.parametrize("name", ["ragged", "valid-by-head", "everything", "values-by-row"])
def test_what_is_not_valid_is_not_looked_at(name: str) -> None:
    (query, key, value), options = CASES[name]
    want = ops.decode_attention(query, key, value, **options)
    valid = options["valid"] if options["valid"].ndim == 3 else options["valid"][:, None].expand(key.shape[:3])

    def poison(x: torch.Tensor | ops.Planes) -> torch.Tensor | ops.Planes:
        if isinstance(x, torch.Tensor):
            return x.masked_fill(~valid[..., None], torch.nan)
        return ops.Planes(x.high, x.low, x.scale.masked_fill(~valid, torch.nan))

    got = ops.decode_attention(query, poison(key), poison(value), **options)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_autocast_does_not_reach_the_op() -> None:
    for name in ("plain", "planes-bf16", "everything-longer", "cap-progressive"):
        arguments, options = CASES[name]
        want = ops.decode_attention(*arguments, **options)
        with torch.autocast("cpu", torch.bfloat16):
            got = ops.decode_attention(*arguments, **options)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_strides_and_gradients_do_not_matter() -> None:
    (query, key, value), options = case()
    want = ops.decode_attention(query, key, value, **options)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (query, key, value)]
    got = ops.decode_attention(*turned, **options)
    torch.testing.assert_close(got.output, want.output)
    assert not got.output.requires_grad


# --- what is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", BROKEN.values(), ids=list(BROKEN))
def test_what_is_not_finite_is_told_where_it_is_read(options: dict[str, Any], bad: float) -> None:
    pruned = "heads" in options
    for broken in "qkv":
        arguments, rest = case(broken=broken, bad=bad, **options)
        found = ops.decode_attention(*arguments, **rest)
        told = ~found.output.isfinite().all(-1)[:, :, 0]
        want = torch.zeros(2, 4, dtype=torch.bool)
        want[0, 2 if broken != "q" else 3 :] = True  # The heads of the last KV head, or the last head.
        want[0, 3] &= not pruned
        assert torch.equal(told, want)
        assert torch.equal(~found.magnitude.isfinite(), want)
        if broken != "v":
            assert torch.equal(found.scores.isnan(), want.any(1)[:, None].expand(2, 37))
        else:
            assert found.scores.isfinite().all()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_softmax_hides_an_infinite_logit(bad: float, softcap: float | None) -> None:
    query, key, value = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 5, 1), torch.ones(1, 1, 5, 1)
    key[0, 0, 2] = bad
    valid = torch.tensor([[True, True, True, True, False]])
    found = ops.decode_attention(query, key, value, scale=1.0, softcap=softcap, valid=valid)
    assert torch.equal(found.scores.isnan(), valid)
    assert found.scores[0, 4] == 0
    assert found.output.isnan().all()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"query": normal(2, 4, 2, 16)},
        {"query": normal(2, 4, 16)},
        {"query": torch.ones(2, 4, 1, 16).long()},
        {"query": normal(2, 3, 1, 16)},
        {"key": normal(2, 2, 37, 8)},
        {"key": normal(2, 2, 30, 16)},
        {"value": normal(2, 4, 37, 16)},
        {"key": normal(2, 2, 37, 16).half()},
        {"value": ops.quantize_planes(normal(1, 2, 37, 16))},
    ],
)
def test_wrong_tensors_are_refused(changed: dict[str, Any]) -> None:
    arguments = dict(zip(("query", "key", "value"), case()[0], strict=True)) | changed
    with pytest.raises(InputError, match=r"decode_attention (takes one query|needs key and value)"):
        ops.decode_attention(**arguments, scale=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"valid": torch.ones(2, 36).bool()},
        {"valid": torch.ones(2, 37)},
        {"heads": torch.ones(2).bool()},
        {"heads": torch.ones(4)},
    ],
)
def test_wrong_masks_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"as torch.bool \[2, 37\] or|as torch.bool \[4\] or"):
        ops.decode_attention(*case()[0], scale=1.0, **options)


@pytest.mark.parametrize("n_values", [0, -3, True, 2.0, torch.tensor([1]), torch.tensor([1.0, 2.0])])
def test_a_wrong_number_of_values_is_refused(n_values: Any) -> None:
    with pytest.raises(OptionError, match="n_values"):
        ops.decode_attention(*case()[0], scale=1.0, n_values=n_values)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, True, "0.1", torch.nan])
def test_a_wrong_threshold_is_refused(threshold: Any) -> None:
    with pytest.raises(OptionError, match="from 0 to 1 as threshold"):
        ops.decode_attention(*case(planes="kv")[0], scale=1.0, threshold=threshold)


@pytest.mark.parametrize("softcap", [0, -1.0, True, "50", torch.inf, torch.nan])
def test_a_wrong_cap_is_refused(softcap: Any) -> None:
    with pytest.raises(OptionError, match="positive, finite number, or None, as softcap"):
        ops.decode_attention(*case()[0], scale=1.0, softcap=softcap)


def test_a_threshold_without_planes_is_refused() -> None:
    with pytest.raises(OptionError, match="quantize_planes makes them"):
        ops.decode_attention(*case(planes="v")[0], scale=1.0, threshold=0.1)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs on the CPU here")
def test_triton_on_a_cpu_tensor_is_refused() -> None:
    with pytest.raises(BackendError, match=r"'torch'.* works? here"):
        ops.decode_attention(*case()[0], scale=1.0, backend="triton")


# --- the Triton version against the torch version ---------------------------------------------------------------------


def work(source: str, target: str) -> None:
    """Run every case in Triton, on memory filled with NaN."""
    torch.use_deterministic_algorithms(True)
    results = {
        name: tuple(ops.decode_attention(*arguments, **options, backend="triton"))
        for name, (arguments, options) in torch.load(source, weights_only=False).items()
    }
    torch.save(results, target)


@pytest.fixture(scope="module")
def triton_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, ...]]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    torch.save(CASES, folder / "cases")
    command = [sys.executable, __file__, str(folder / "cases"), str(folder / "results")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results")


@pytest.mark.parametrize("name", CASES)
def test_triton_follows_torch(name: str, triton_results: dict[str, tuple[torch.Tensor, ...]]) -> None:
    arguments, options = CASES[name]
    got = ops.DecodedStep(*triton_results[name])
    assert got.output.dtype == arguments[0].dtype
    assert_same(got, ops.decode_attention(*arguments, **options, backend="torch"), error(arguments, triton=True))


if __name__ == "__main__":
    work(*sys.argv[1:])
