"""8-bit quantisation against its definition, element by element, and its edge cases."""

from __future__ import annotations

import pytest
import torch
from turbokernels.quantize.api import quantize_block, quantize_channel, quantize_token


def to_float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def exact_int8(row: list[float], divisor: int, low: int, high: int) -> list[int]:
    """round(x / scale), scale = amax / divisor: both quotients rounded to float32 (exact via float64), halves to
    even.
    """
    scale = to_float32(max(map(abs, row)) / divisor)
    return [min(high, max(low, round(to_float32(x / scale)))) for x in row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_int8_is_the_exact_rounding(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 37).to(dtype)
    q, scale = quantize_token(x)
    assert q.shape == x.shape
    assert q.dtype == torch.int8
    assert scale.shape == (2, 3)
    assert scale.dtype == torch.float32
    for b in range(2):
        for token in range(3):
            assert q[b, token].tolist() == exact_int8(x[b, token].tolist(), 127, -127, 127)


def test_halves_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])  # scale is exactly 1
    assert quantize_channel(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]


def test_block_is_the_exact_rounding_and_saturates() -> None:
    x = torch.randn(2, 5, 7)
    q, scale = quantize_block(x, 4)
    assert scale.shape == (2, 2, 2)
    for b in range(2):
        for i in (slice(0, 4), slice(4, 8)):
            for j in (slice(0, 4), slice(4, 8)):
                tile = x[b, i, j]
                assert q[b, i, j].flatten().tolist() == exact_int8(tile.flatten().tolist(), 128, -128, 127)
                assert scale[b, i.start // 4, j.start // 4] == tile.abs().max() / 128
    q, _ = quantize_block(torch.tensor([[3.0, -3.0]]))
    assert q.tolist() == [[127, -128]]


def test_block_of_a_batch_equals_its_samples() -> None:
    x = torch.randn(3, 130, 200)
    q, scale = quantize_block(x)
    for b in range(3):
        one_q, one_scale = quantize_block(x[b])
        assert torch.equal(q[b], one_q)
        assert torch.equal(scale[b], one_scale)


def test_fp8_rounds_to_the_nearest_and_keeps_the_largest_value() -> None:
    x = torch.randn(4, 64) * torch.tensor([[1e-3], [1.0], [1e3], [1e30]])
    q, scale = quantize_token(x, torch.float8_e4m3fn)
    assert q.dtype == torch.float8_e4m3fn
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()]
    target = x.double() / scale.double()[:, None]
    error = (q.double() - target).abs()
    nearest = (grid[:, None, None] - target).abs().amin(0)
    # Equal up to the float32 rounding of x / scale, which can move a value across the middle of two grid points.
    assert (error <= nearest + target.abs() * 2**-23).all()
    assert q.double().abs().amax(1).tolist() == [448.0] * 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_zero_and_vanishing_rows_get_scale_one(dtype: torch.dtype) -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-40), torch.ones(8)])
    q, scale = quantize_token(x, dtype)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert not q[:2].float().any()
    assert quantize_block(torch.zeros(3, 3))[1].item() == 1.0


def test_non_finite_rows_stay_visible_and_alone() -> None:
    x = torch.randn(3, 8)
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    _, scale = quantize_token(x)
    assert scale.isfinite().tolist() == [False, False, True]


def test_strides_do_not_matter() -> None:
    x = torch.randn(64, 9, 2)[:, ::2, 0].t()  # (5, 64), neither dimension contiguous
    for function in (quantize_token, quantize_channel, quantize_block):
        for got, expected in zip(function(x), function(x.contiguous())):
            assert torch.equal(got, expected)


def test_empty_batches_pass() -> None:
    assert quantize_token(torch.empty(0, 8))[0].shape == (0, 8)
    assert quantize_block(torch.empty(0, 8))[1].shape == (0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_token(torch.ones(2, 2, dtype=torch.int32)), "int32"),
        (lambda: quantize_token(torch.ones(2, 0)), r"\(2, 0\)"),
        (lambda: quantize_channel(torch.ones(2)), r"\(2,\)"),
        (lambda: quantize_token(torch.ones(2, 2), torch.float16), "float16"),
        (lambda: quantize_block(torch.ones(2)), r"\(2,\)"),
        (lambda: quantize_block(torch.ones(2, 2), 0), "block=0"),
        (lambda: quantize_block(torch.ones(2, 2), activation="relu"), "activation='relu'"),
        (lambda: quantize_block(torch.ones(2, 3), smooth=torch.ones(2)), r"smooth is torch.float32 \(2,\).*of 3"),
        (lambda: quantize_token(torch.ones(2, 2), impl="fast"), "fast"),
        (lambda: quantize_token(torch.ones(2, 2), impl="triton"), "reference"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
