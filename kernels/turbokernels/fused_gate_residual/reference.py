"""Specification of the gated residual, and of the norm after it, in plain PyTorch (Wan, arXiv 2503.20314).

Shape suffixes: B batch, L tokens, C channels; S is 1 (one gate per sample) or L (one per token).
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokernels.fused_norm_modulate import reference as norm
from turbokernels.softmax_core import compute_dtype


def gate_residual(x_BLC: Tensor, y_BLC: Tensor, gate_BSC: Tensor | None) -> Tensor:
    """x + y * gate; None is a gate of 1."""
    dtype = compute_dtype(x_BLC.dtype)
    if gate_BSC is None:
        return (x_BLC.to(dtype) + y_BLC.to(dtype)).to(x_BLC.dtype)
    return torch.addcmul(x_BLC.to(dtype), y_BLC.to(dtype), gate_BSC.to(dtype)).to(x_BLC.dtype)


def gate_residual_norm(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BSC: Tensor | None,
    scale_BSC: Tensor,
    shift_BSC: Tensor,
    eps: float,
    affine: bool = False,
) -> tuple[Tensor, Tensor]:
    """x + y * gate in x's dtype, and the modulated norm of that in y's dtype."""
    out_BLC = gate_residual(x_BLC, y_BLC, gate_BSC)
    return out_BLC, norm.modulated(out_BLC, scale_BSC, shift_BSC, eps, affine).to(y_BLC.dtype)


@torch.no_grad()
def gate_residual_norm_quantize(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BSC: Tensor | None,
    scale_BSC: Tensor,
    shift_BSC: Tensor,
    eps: float,
    dtype: torch.dtype,
    affine: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + y * gate in x's dtype, and the modulated norm of that: values of `dtype` and float32 scales (B, L)."""
    out_BLC = gate_residual(x_BLC, y_BLC, gate_BSC)
    return out_BLC, *norm.layer_norm_modulate_quantize(out_BLC, scale_BSC, shift_BSC, eps, dtype, affine)
