"""Quantisation kernels on a GPU: the CPU reference's integers, bit for bit."""

from __future__ import annotations

import cases_quantize as cases
import pytest
import torch
from cases_quantize import FP8
from turbokernels import quantize_token

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (63, 37), (2, 257, 1536), (130, 5120), (33, 8960), (5, 13824), (3, 30000)])
@pytest.mark.parametrize("target", [torch.int8, FP8])
def test_rows(shape: tuple[int, ...], dtype: torch.dtype, target: torch.dtype) -> None:
    if target == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("conversion to fp8 needs compute capability 8.9")
    cases.check_rows(shape, dtype, target, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block"), [((1, 1), 16), ((2, 257, 1000), 128), ((1, 257, 64), 64), ((2, 3, 33, 40), 32)]
)
def test_tiles(shape: tuple[int, ...], block: int, dtype: torch.dtype) -> None:
    cases.check_tiles(shape, block, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "smoothed"), [("gelu_tanh", False), (None, True), ("gelu_tanh", True)])
def test_producer(dtype: torch.dtype, activation: str | None, smoothed: bool) -> None:
    cases.check_producer(dtype, activation, smoothed, "cuda")


@pytest.mark.parametrize("check", [cases.check_strides, cases.check_zero_and_non_finite, cases.check_empty])
def test_edges(check) -> None:
    check("cuda")


def test_a_video() -> None:
    cases.check_rows((1, 32760, 1536), torch.bfloat16, torch.int8, "cuda")


def test_compiles_without_a_graph_break() -> None:
    x = torch.randn(2, 65, 96, device="cuda")
    compiled = torch.compile(lambda x: quantize_token(x, activation="gelu_tanh"), fullgraph=True)
    for got, expected in zip(compiled(x), quantize_token(x, activation="gelu_tanh")):
        assert torch.equal(got, expected)
