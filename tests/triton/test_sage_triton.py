"""Quantised attention's kernels under the interpreter."""

from __future__ import annotations

import cases_sage as cases
import pytest
import torch
from turbokernels import sage_attention

FORMATS = ("fp8", "fp16")


@pytest.mark.parametrize("pv", FORMATS)
@pytest.mark.parametrize(
    ("length_q", "length_k", "block_q", "block_k", "dim"),
    [
        (1, 1, 16, 16, 16),
        (33, 257, 32, 16, 32),
        (65, 130, 64, 64, 64),
        (130, 200, 128, 128, 16),
    ],
)
def test_sparse(pv: str, length_q: int, length_k: int, block_q: int, block_k: int, dim: int) -> None:
    cases.check_sparse(pv, length_q, length_k, block_q, block_k, dim, torch.float32, "cpu")


@pytest.mark.parametrize("pv", FORMATS)
def test_dense(pv: str) -> None:
    cases.check_dense(pv, 130, 100, 32, torch.float16, "cpu")


@pytest.mark.parametrize("pv", FORMATS)
def test_accuracy(pv: str) -> None:
    cases.check_accuracy(pv, 130, 64, torch.float32, "cpu")


def test_smoothing_removes_a_common_key_offset() -> None:
    cases.check_smoothing("cpu")


@pytest.mark.parametrize("pv", FORMATS)
def test_zero_operands(pv: str) -> None:
    cases.check_zeros(pv, "cpu")


@pytest.mark.parametrize("pv", FORMATS)
def test_nan_propagates(pv: str) -> None:
    cases.check_nan_propagates(pv, "cpu")


def test_what_the_kernels_cannot_do_is_refused() -> None:
    x = torch.randn(1, 8, 1, 24)
    with pytest.raises(ValueError, match=r"no head dim 24; use 16, 32, 64, 128 or impl='reference'"):
        sage_attention(x, x, x, impl="triton")
    x = torch.randn(1, 8, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no torch.float64; use float16, bfloat16, float32 or impl='reference'"):
        sage_attention(x, x, x, impl="triton")
    x = torch.randn(1, 8, 1, 16)
    with pytest.raises(RuntimeError, match=r"jvp|forward mode|setup_context"):
        torch.func.jvp(lambda y: sage_attention(y, y, y, impl="triton"), (x,), (x,))


def test_a_compiled_graph_does_not_break() -> None:
    q, k, v = torch.randn(3, 1, 40, 1, 32).unbind(0)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sage_attention(q, k, v, "fp16", impl="triton") * 2.0

    assert torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v).equal(run(q, k, v))
