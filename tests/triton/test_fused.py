"""Element-wise kernels under the interpreter."""

from __future__ import annotations

import cases_fused as cases
import pytest
import torch
from cases_quantize import FP8, repair_the_interpreters_fp8
from turbokernels import layer_norm_modulate, layer_norm_modulate_quantize
from turbokernels.fused_norm_modulate.kernel import residual_norm

DTYPES = [torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 1), (2, 9, 63), (1, 3, 1536), (2, 2, 300)])
def test_norm(batch: int, length: int, width: int, per_token: bool, dtype: torch.dtype) -> None:
    cases.check_norm(batch, length, width, per_token, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("batch", "length", "width"), [(2, 7, 40), (1, 3, 520)])
def test_gate(batch: int, length: int, width: int, per_token: bool, dtype: torch.dtype) -> None:
    cases.check_gate(batch, length, width, per_token, dtype, torch.float16, "cpu")


@pytest.mark.parametrize("target", [torch.int8, FP8])
def test_quantised_norms(target: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    repair_the_interpreters_fp8(monkeypatch)
    cases.check_quantised_norms(2, 33, 300, target, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 128), (3, 8), (5, 12), (2, 64)])
def test_rope(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    cases.check_rope(2, 5, heads, head_dim, dtype, "cpu")


@pytest.mark.parametrize(
    "check", [cases.check_strides, cases.check_non_finite, cases.check_gradients, cases.check_tangents_are_refused]
)
def test_edges(check) -> None:
    check("cpu")


def test_no_graph_break() -> None:
    cases.check_no_graph_break("cpu", "aot_eager")


def test_operator_registration() -> None:
    x, gate = torch.randn(1, 5, 40), torch.randn(1, 1, 40)
    for operands in ((x, x, gate, gate, gate, 1e-6, torch.int8), (x, None, None, gate, gate, 1e-6, None)):
        torch.library.opcheck(residual_norm, operands, test_utils=("test_schema", "test_faketensor"))


def test_what_the_kernel_does_not_do_is_named() -> None:
    x, one = torch.randn(1, 2, 8), torch.randn(1, 1, 8)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64; use impl='reference'"):
        layer_norm_modulate(x.double(), one, one, impl="triton")
    with pytest.raises(ValueError, match="x requires grad, but rounding to 8 bits has no useful gradient"):
        layer_norm_modulate_quantize(x.requires_grad_(), one, one)
    with pytest.raises(ValueError, match=r"torch\.float16 is not an 8-bit type"):
        layer_norm_modulate_quantize(x.detach(), one, one, dtype=torch.float16)
