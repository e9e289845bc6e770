"""Quantisation kernels under the interpreter, and the arithmetic that the interpreter cannot show."""

from __future__ import annotations

import cases_quantize as cases
import pytest
import torch
from cases_quantize import FP8
from turbokernels import quantize_block, quantize_token

DTYPES = [torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (63, 37), (2, 5, 256), (3, 1536), (2, 1, 5, 600)])
@pytest.mark.parametrize("target", [torch.int8, FP8])
def test_rows(shape: tuple[int, ...], dtype: torch.dtype, target: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.repair_the_interpreters_fp8(monkeypatch)
    cases.check_rows(shape, dtype, target, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block"), [((1, 1), 16), ((2, 130, 200), 128), ((1, 257, 64), 64), ((2, 3, 33, 40), 32)]
)
def test_tiles(shape: tuple[int, ...], block: int, dtype: torch.dtype) -> None:
    cases.check_tiles(shape, block, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "smoothed"), [("gelu_tanh", False), (None, True), ("gelu_tanh", True)])
def test_producer(dtype: torch.dtype, activation: str | None, smoothed: bool) -> None:
    cases.check_producer(dtype, activation, smoothed, "cpu")


@pytest.mark.parametrize("check", [cases.check_strides, cases.check_zero_and_non_finite, cases.check_empty])
def test_edges(check) -> None:
    check("cpu")


def test_the_quotient_is_the_correctly_rounded_one() -> None:
    """rows.quotient, its fused operations in float64 (which holds their exact results here), against IEEE division."""
    amax = torch.cat([torch.rand(200_000) + 0.5, torch.arange(1024, 2048) / 1024, torch.logspace(-25, 30, 5000)])
    divisor = amax / 127
    inverse = 1 / divisor
    for x in (amax / 2, amax, amax * torch.rand_like(amax), (amax * torch.rand_like(amax)).bfloat16().float()):
        q = x * inverse
        for _ in range(2):
            remainder = (x.double() - q.double() * divisor.double()).float()
            q = (q.double() + remainder.double() * inverse.double()).float()
        assert torch.equal(q, x / divisor)


def test_what_the_kernel_does_not_do_is_named() -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64; use impl='reference'"):
        quantize_token(torch.ones(2, 2, dtype=torch.float64), impl="triton")
    with pytest.raises(ValueError, match="up to 32768 features and x has 40000; use impl='reference'"):
        quantize_token(torch.ones(1, 40000), impl="triton")
    with pytest.raises(ValueError, match="not block=24; use impl='reference'"):
        quantize_block(torch.ones(2, 2), 24, impl="triton")
    with pytest.raises(ValueError, match="activation='relu' is not known; use one of None, 'gelu_tanh'"):
        quantize_token(torch.ones(2, 2), activation="relu")
    with pytest.raises(ValueError, match=r"smooth is torch.float32 \(3,\); expected a packed float32 vector of 2"):
        quantize_token(torch.ones(2, 2), smooth=torch.ones(3))
