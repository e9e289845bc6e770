"""Element-wise references against formulas with complex numbers and explicit statistics, and the error budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from turbokernels import (
    gate_residual,
    gate_residual_norm,
    gate_residual_norm_quantize,
    layer_norm_modulate,
    layer_norm_modulate_quantize,
    quantize_token,
    rms_norm_rope,
)
from turbokernels.testing import assert_within_budget

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def complex_rope(x_BLND: Tensor, weight: Tensor, angle_LH: Tensor, eps: float = 1e-6) -> Tensor:
    flat = x_BLND.flatten(2)
    normed = (flat / (flat.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight).view_as(x_BLND)
    pairs = torch.complex(normed[..., 0::2].double(), normed[..., 1::2].double())
    turned = pairs * torch.polar(torch.ones_like(angle_LH), angle_LH)[:, None].to(torch.complex128)
    return torch.view_as_real(turned).flatten(-2).to(x_BLND.dtype)


def norm_modulate(x_BLC: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x_BLC - x_BLC.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 + scale) + shift


@pytest.mark.parametrize("length", [1, 63])
def test_rms_norm_rope_in_float64(length: int) -> None:
    x, weight = torch.randn(2, length, 3, 8, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    angle = torch.randn(length, 4, dtype=torch.float64)
    got = rms_norm_rope(x, weight, angle.cos(), angle.sin())
    torch.testing.assert_close(got, complex_rope(x, weight, angle), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rope_budget(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 33, 3, 8).to(dtype), torch.randn(24)
    angle = torch.randn(33, 4, dtype=torch.float64)
    got = rms_norm_rope(x, weight, angle.cos(), angle.sin())
    plain = complex_rope(x, weight.to(dtype), angle)
    assert got.dtype == dtype
    assert_within_budget(got, plain, complex_rope(x.double(), weight.double(), angle))


@pytest.mark.parametrize("modulation_length", [1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_modulate(dtype: torch.dtype, modulation_length: int) -> None:
    x = (torch.randn(2, 33, 48) * 3 + 1).to(dtype)
    scale, shift = torch.randn(2, 2, modulation_length, 48).to(dtype)
    exact = norm_modulate(x.double(), scale.double(), shift.double())
    got = layer_norm_modulate(x, scale, shift)
    assert got.dtype == dtype
    assert_within_budget(got, norm_modulate(x, scale, shift), exact)
    in_float64 = layer_norm_modulate(x.double(), scale.double(), shift.double())
    torch.testing.assert_close(in_float64, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("modulation_length", [1, 33])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_gate_residual(dtype: torch.dtype, modulation_length: int) -> None:
    x, y = torch.randn(2, 2, 33, 48).to(dtype)
    gate = torch.randn(2, modulation_length, 48).to(dtype)
    got = gate_residual(x, y, gate)
    assert got.dtype == dtype
    assert_within_budget(got, x + y * gate, x.double() + y.double() * gate.double())


def test_a_wide_stream_keeps_its_dtype() -> None:
    """The residual stream is float32 while the branch is bf16: nothing is rounded to 16 bits on the way."""
    x, y, gate = torch.randn(1, 4, 8), torch.randn(1, 4, 8).bfloat16(), torch.randn(1, 1, 8)
    assert gate_residual(x, y, gate).equal(torch.addcmul(x, y.float(), gate))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_chains_are_their_links(dtype: torch.dtype) -> None:
    """A norm after the residual is of the stored stream; its values are quantised before any rounding to 16 bits."""
    x, y, gate = torch.randn(2, 5, 48), torch.randn(2, 5, 48).bfloat16(), torch.randn(2, 1, 48)
    scale, shift = torch.randn(2, 2, 1, 48).unbind(0)
    stream = gate_residual(x, y, gate)
    out, h = gate_residual_norm(x, y, gate, scale, shift)
    assert h.dtype == y.dtype
    assert torch.equal(out, stream)
    assert torch.equal(h, layer_norm_modulate(stream, scale, shift).bfloat16())
    expected = quantize_token(layer_norm_modulate(stream, scale, shift), dtype)
    chained = gate_residual_norm_quantize(x, y, gate, scale, shift, dtype=dtype)
    assert torch.equal(chained[0], stream)
    for values, token_scale in (chained[1:], layer_norm_modulate_quantize(stream, scale, shift, dtype=dtype)):
        assert torch.equal(values.float(), expected[0].float())
        assert torch.equal(token_scale, expected[1])


def test_affine_norms_and_residuals_without_gate() -> None:
    """gate None is 1; an affine norm multiplies by its weight alone, so that a small one keeps its bits."""
    x, y = torch.randn(2, 2, 5, 48).unbind(0)
    weight, bias = (1e-6 * torch.randn(2, 48)).unbind(0)
    of_norm = (t.expand(2, 1, 48) for t in (weight, bias))
    out, h = gate_residual_norm(x, y, None, *of_norm, affine=True)
    assert torch.equal(out, x + y)
    torch.testing.assert_close(h, torch.nn.functional.layer_norm(out, (48,), weight, bias, 1e-6), atol=0, rtol=1e-4)
    values, scale = layer_norm_modulate_quantize(out, weight.expand(2, 1, 48), bias.expand(2, 1, 48), affine=True)
    assert torch.equal(values, quantize_token(h)[0])
    assert torch.equal(scale, quantize_token(h)[1])


def test_norm_without_rotation() -> None:
    x, weight = torch.randn(2, 7, 3, 8), torch.randn(24)
    still = torch.zeros(7, 4)
    assert torch.equal(rms_norm_rope(x, weight), rms_norm_rope(x, weight, still.cos(), still.sin()))


@torch.no_grad()
def test_norm_in_place() -> None:
    """One of three projections that lie together, as inference has them: its neighbours are left alone."""
    together, weight, angle = torch.randn(2, 7, 9, 8), torch.randn(24), torch.randn(7, 4)
    before = together.clone()
    x = together[:, :, 3:6]
    expected = rms_norm_rope(x, weight, angle.cos(), angle.sin())
    assert rms_norm_rope(x, weight, angle.cos(), angle.sin(), in_place=True) is x
    assert torch.equal(x, expected)
    for i in (0, 6):
        assert torch.equal(together[:, :, i : i + 3], before[:, :, i : i + 3])


def test_gradients_reach_every_operand() -> None:
    x, y = torch.randn(2, 1, 5, 8, dtype=torch.float64).unbind(0)
    one = torch.randn(1, 1, 8, dtype=torch.float64)
    operands = tuple(t.clone().requires_grad_() for t in (x, y, one))
    assert torch.autograd.gradcheck(gate_residual, operands)
    assert torch.autograd.gradcheck(layer_norm_modulate, (operands[0], operands[2], operands[2]))
    angle = torch.randn(5, 2, dtype=torch.float64)
    heads, weight = operands[0].view(1, 5, 2, 4), torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_rope(x, w, angle.cos(), angle.sin()), (heads, weight))


def test_bad_operands() -> None:
    x, angle = torch.randn(1, 5, 2, 4), torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\); expected \(8,\)"):
        rms_norm_rope(x, torch.ones(4), angle, angle)
    with pytest.raises(ValueError, match=r"sin has shape \(4, 2\); expected \(5, 2\)"):
        rms_norm_rope(x, torch.ones(8), angle, angle[:4])
    with pytest.raises(ValueError, match="cos is missing; pass cos and sin together, or neither"):
        rms_norm_rope(x, torch.ones(8), None, angle)
    with pytest.raises(ValueError, match="in_place overwrites what a gradient needs"):
        rms_norm_rope(x, torch.ones(8, requires_grad=True), in_place=True)
    with pytest.raises(ValueError, match="even head dim"):
        rms_norm_rope(torch.randn(1, 5, 2, 3), torch.ones(6), angle, angle)
    with pytest.raises(ValueError, match=r"scale has shape \(1, 8\); expected \(1, 1, 8\) or \(1, 5, 8\)"):
        layer_norm_modulate(x.flatten(2), torch.ones(1, 8), torch.ones(1, 1, 8))
    with pytest.raises(ValueError, match=r"y has shape \(1, 4, 8\); expected x's shape"):
        gate_residual(x.flatten(2), torch.ones(1, 4, 8), torch.ones(1, 1, 8))
    with pytest.raises(ValueError, match="gate is on meta but x is on cpu"):
        gate_residual(x.flatten(2), x.flatten(2), torch.ones(1, 1, 8, device="meta"))
