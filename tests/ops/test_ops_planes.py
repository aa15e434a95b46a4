"""Two planes of four bits: the integers, the errors, what is exact, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune import ops
from tokenprune.errors import InputError


def vectors(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def naive(row: list[float], *, low: bool) -> list[float]:
    """One vector, number by number, in fp64."""
    scale = max(map(abs, row)) / 127
    result = []
    for x in row:
        q = round(x / scale) + 128 if scale else 128
        high, rest = divmod(q, 16)
        result.append(scale * (16 * high + (rest if low else 7.5) - 128))
    return result


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_vectors_come_back_as_the_naive_loop_says(dtype: torch.dtype, low: bool) -> None:
    x = vectors(5, 64, dtype=dtype)
    want = torch.tensor([naive(row, low=low) for row in x.tolist()])
    got = ops.dequantize_planes(ops.quantize_planes(x), low=low)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_integers_of_eight_bits_come_back_exactly() -> None:
    x = torch.arange(-127, 128).repeat(2)[:, None].expand(-1, 2).reshape(2, -1).float() * 2.0**-5
    planes = ops.quantize_planes(x)
    assert torch.equal(planes.scale, torch.full((2,), 2.0**-5))
    assert torch.equal(ops.dequantize_planes(planes), x)
    q = x * 32
    assert torch.equal(ops.dequantize_planes(planes, low=False) * 32, (q / 16).floor() * 16 + 7.5)


def test_where_the_nibbles_are() -> None:
    planes = ops.quantize_planes(torch.tensor([[-127.0, 0.0, 1.0, 127.0]]))  # 1, 128, 129, 255 above -128.
    assert planes.high.tolist() == [[0x0 | 0x8 << 4, 0x8 | 0xF << 4]]
    assert planes.low.tolist() == [[0x1 | 0x1 << 4, 0x0 | 0xF << 4]]
    assert planes.shape == (1, 4)
    assert planes.nbytes == 2 + 2 + 4


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=2, max_size=8).filter(
        lambda row: len(row) % 2 == 0
    )
)
def test_errors_are_bounded(row: list[float]) -> None:
    x = torch.tensor(row)
    planes = ops.quantize_planes(x)
    slack = planes.scale * 1e-4
    assert ((ops.dequantize_planes(planes) - x).abs() <= planes.scale / 2 + slack).all()
    assert ((ops.dequantize_planes(planes, low=False) - x).abs() <= planes.scale * 8 + slack).all()


def test_a_zero_vector_stays_zero_and_a_broken_one_shows() -> None:
    x = vectors(4, 8)
    x[0], x[1, 3], x[2, 5] = 0.0, torch.nan, torch.inf
    planes = ops.quantize_planes(x)
    for low in (True, False):
        got = ops.dequantize_planes(planes, low=low)
        assert torch.equal(got[0], torch.zeros(8))
        assert not got[1:3].isfinite().any()
        assert got[3].isfinite().all()


def test_the_high_plane_leans_to_no_side() -> None:
    x = vectors(400, 128)
    error = ops.dequantize_planes(ops.quantize_planes(x), low=False) - x
    assert error.mean().abs() < 0.01 * error.abs().mean()


def test_a_vector_is_quantized_by_itself() -> None:
    x = vectors(2, 3, 7, 16)
    planes = ops.quantize_planes(x)
    assert (planes.high.shape, planes.scale.shape, planes.shape) == ((2, 3, 7, 8), (2, 3, 7), x.shape)
    part = planes.each(lambda tensor: tensor[1:, :, 2:5])
    assert torch.equal(ops.dequantize_planes(part), ops.dequantize_planes(ops.quantize_planes(x[1:, :, 2:5])))


def test_the_dtype_asked_for() -> None:
    planes = ops.quantize_planes(vectors(3, 16, dtype=torch.bfloat16).requires_grad_())
    got = ops.dequantize_planes(planes, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, ops.dequantize_planes(planes).bfloat16())


@pytest.mark.parametrize("x", [torch.ones(3, 5), torch.ones(3, 4).long(), torch.tensor(1.0), torch.ones(3, 0)])
def test_wrong_vectors_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(InputError, match="even K"):
        ops.quantize_planes(x)
