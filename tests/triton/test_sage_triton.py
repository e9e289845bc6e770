"""Quantised attention's kernels under the interpreter."""

from __future__ import annotations

import cases_sage as cases
import pytest
import torch
from turbokernels import sage_attention, sage_sla

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


@pytest.mark.parametrize(
    ("pv", "length_q", "length_k", "block_q", "block_k", "dim", "feature_map"),
    [
        ("fp8", 1, 1, 16, 16, 16, "softmax"),
        ("fp16", 33, 257, 32, 16, 32, "relu"),
        ("fp8", 130, 65, 64, 64, 64, "elu"),
        ("fp8", 200, 200, 128, 64, 16, "softmax"),
    ],
)
def test_with_the_linear_branch_in_one_call(
    pv: str, length_q: int, length_k: int, block_q: int, block_k: int, dim: int, feature_map: str
) -> None:
    cases.check_one_call(pv, length_q, length_k, block_q, block_k, dim, torch.float32, "cpu", feature_map)


def test_one_call_in_a_compiled_graph() -> None:
    q, k, v = torch.randn(3, 1, 40, 1, 32).unbind(0)
    weight = torch.randn(32, 32)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sage_sla(q, k, v, weight, None, 0.5, 16, 16, pv="fp16", impl="triton")[0] * 2.0

    with torch.no_grad():
        assert torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v).equal(run(q, k, v))


def test_one_call_refuses_what_it_cannot_do() -> None:
    q, k, v = torch.randn(3, 1, 40, 1, 32).unbind(0)
    weight = torch.randn(32, 32)
    for arguments, message in (
        ((weight, None, 0.0, 16, 16), r"sage_sla: topk=0.0 is out of range"),
        ((weight, None, 0.5, 24, 16), r"sage_sla: block_q=24"),
        (
            (weight[:16], None, 0.5, 16, 16),
            r"sage_sla: weight is torch.float32 \(16, 32\); expected floating \(32, 32\)",
        ),
        ((weight, None, 0.5, 16, 16, "gelu"), r"sage_sla: feature_map='gelu' is not known"),
        ((weight, None, 0.5, 16, 16, "elu", "bf16"), r"sage_sla: pv='bf16' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            sage_sla(q, k, v, *arguments)
    with pytest.raises(ValueError, match="sage_sla: an operand requires a gradient"):
        sage_sla(q.clone().requires_grad_(), k, v, weight, None, 0.5, 16, 16)


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
