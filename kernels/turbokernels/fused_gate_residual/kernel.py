"""The gated residual, alone or with the norm after it: fused_norm_modulate's kernel with a branch."""

from __future__ import annotations

from typing import Any

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
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, affine: bool = False
) -> tuple[Tensor, Tensor]:
    """As reference.gate_residual_norm."""
    gates = () if gate is None else (gate,)
    check("gate_residual_norm", None, x, y, scale, shift, *gates)

    def fused(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, h = residual_norm(x, y, gate, scale, shift, eps, None, affine)
        return out, h

    def of_reference(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None = None) -> Any:
        return reference.gate_residual_norm(x, y, gate, scale, shift, eps, affine)

    return differentiable("gate_residual_norm", fused, of_reference, x, y, scale, shift, *gates)


def gate_residual_norm_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
    affine: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.gate_residual_norm_quantize."""
    op = "gate_residual_norm_quantize"
    operands = (x, y, scale, shift) if gate is None else (x, y, scale, shift, gate)
    check(op, dtype, *operands)
    refuse_tangents(op, *operands)
    out, values, token_scale = residual_norm(x, y, gate, scale, shift, eps, dtype, affine)
    return out, values, token_scale
