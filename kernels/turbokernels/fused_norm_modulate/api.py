"""Public entries of LayerNorm + modulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbokernels import dispatch
from turbokernels.checks import check_inference, check_modulation
from turbokernels.fused_norm_modulate import reference
from turbokernels.quantize.api import check_dtype


def _triton(*operands: Any) -> Tensor:
    from turbokernels.fused_norm_modulate import kernel  # here, so that the library imports without Triton

    return kernel.layer_norm_modulate(*operands)


def _triton_quantize(*operands: Any) -> tuple[Tensor, Tensor]:
    from turbokernels.fused_norm_modulate import kernel

    return kernel.layer_norm_modulate_quantize(*operands)


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.layer_norm_modulate}
QUANTIZE_IMPLEMENTATIONS = {"triton": _triton_quantize, "reference": reference.layer_norm_modulate_quantize}


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, impl: str = "auto", *, affine: bool = False
) -> Tensor:
    """LayerNorm over the channels (no affine parameters), times 1 + scale, plus shift; (B, L, C) in x's dtype.

    x: (B, L, C); scale, shift: (B, 1, C) or (B, L, C), any floating dtype (modulation is float32 in Wan); contiguous
    last dimension. Arithmetic is float32 (float64 for float64 x), rounded once at the end. `affine`: times scale
    alone, for an affine norm's weight and bias.
    Errors: ValueError when shapes, dtypes, devices or strides do not fit.
    Source: Wan's adaptive layer norm, arXiv 2503.20314.
    """
    check_modulation("layer_norm_modulate", x, scale=scale, shift=shift)
    return dispatch.choose("layer_norm_modulate", impl, x.device, IMPLEMENTATIONS)(x, scale, shift, eps, affine)


def layer_norm_modulate_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.int8,
    impl: str = "auto",
    *,
    affine: bool = False,
) -> tuple[Tensor, Tensor]:
    """`layer_norm_modulate`, then `quantize_token` to `dtype`: values (B, L, C), float32 scale (B, L), for `w8a8_linear`.

    What is quantised is the float32 result, without rounding to x's dtype in between. For inference.
    Errors: as `layer_norm_modulate`, for another dtype than int8 and float8_e4m3fn, and operands that require grad.
    Source: method.md section 7.
    """
    op = "layer_norm_modulate_quantize"
    check_modulation(op, x, scale=scale, shift=shift)
    check_dtype(op, dtype)
    check_inference(op, x=x, scale=scale, shift=shift)
    return dispatch.choose(op, impl, x.device, QUANTIZE_IMPLEMENTATIONS)(x, scale, shift, eps, dtype, affine)
