"""Element-wise kernels on a GPU."""

from __future__ import annotations

import cases_fused as cases
import pytest
import torch
from cases_quantize import FP8

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 1), (2, 63, 300), (1, 257, 1536), (2, 33, 5120)])
def test_norm_and_gate(batch: int, length: int, width: int, per_token: bool, dtype: torch.dtype) -> None:
    cases.check_norm(batch, length, width, per_token, dtype, "cuda")
    cases.check_gate(batch, length, width, per_token, dtype, torch.bfloat16, "cuda")


@pytest.mark.parametrize("target", [torch.int8, FP8])
@pytest.mark.parametrize("width", [300, 1536, 5120])
def test_quantised_norms(target: torch.dtype, width: int) -> None:
    if target == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("conversion to fp8 needs compute capability 8.9")
    cases.check_quantised_norms(2, 65, width, target, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 128), (40, 128), (3, 8), (5, 12), (2, 64), (8, 32)])
def test_rope(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    cases.check_rope(2, 63, heads, head_dim, dtype, "cuda")


def test_a_video() -> None:
    cases.check_norm(1, 32760, 1536, False, torch.bfloat16, "cuda")
    cases.check_rope(1, 32760, 12, 128, torch.bfloat16, "cuda")


@pytest.mark.parametrize(
    "check", [cases.check_strides, cases.check_non_finite, cases.check_gradients, cases.check_tangents_are_refused]
)
def test_edges(check) -> None:
    check("cuda")


def test_no_graph_break() -> None:
    cases.check_no_graph_break("cuda", "inductor")
