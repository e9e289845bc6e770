"""Public entry of LayerNorm + modulation."""

from __future__ import annotations

from torch import Tensor

from turbokernels import dispatch
from turbokernels.checks import check_modulation
from turbokernels.fused_norm_modulate import reference

IMPLEMENTATIONS = {"reference": reference.layer_norm_modulate}


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """LayerNorm over the channels (no affine parameters), times 1 + scale, plus shift; (B, L, C) in x's dtype.

    x: (B, L, C); scale, shift: (B, 1, C) or (B, L, C), any floating dtype (modulation is float32 in Wan); contiguous
    last dimension. Arithmetic is float32 (float64 for float64 x), rounded once at the end.
    Errors: ValueError when shapes, dtypes, devices or strides do not fit.
    Source: Wan's adaptive layer norm, arXiv 2503.20314.
    """
    check_modulation("layer_norm_modulate", x, scale=scale, shift=shift)
    return dispatch.choose("layer_norm_modulate", impl, x.device, IMPLEMENTATIONS)(x, scale, shift, eps)
