"""The gated residual, alone or with the norm after it: fused_norm_modulate's kernel with a branch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from turbokernels.fused_gate_residual import reference
from turbokernels.fused_norm_modulate.kernel import check, residual_norm
from turbokernels.recompute import differentiable, refuse_tangents


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """As reference.gate_residual."""
    check("gate_residual", None, x, y, gate)

    def fused(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return residual_norm(x, y, gate, None, None, 0.0, None)[0]

    return differentiable("gate_residual", fused, reference.gate_residual, x, y, gate)


def gate_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As reference.gate_residual_norm."""
    check("gate_residual_norm", None, x, y, gate, scale, shift)

    def fused(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        out, h = residual_norm(x, y, gate, scale, shift, eps, None)
        return out, h

    of_reference = partial(reference.gate_residual_norm, eps=eps)
    return differentiable("gate_residual_norm", fused, of_reference, x, y, gate, scale, shift)


def gate_residual_norm_quantize(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.gate_residual_norm_quantize."""
    check("gate_residual_norm_quantize", dtype, x, y, gate, scale, shift)
    refuse_tangents("gate_residual_norm_quantize", x, y, gate, scale, shift)
    out, values, token_scale = residual_norm(x, y, gate, scale, shift, eps, dtype)
    return out, values, token_scale
