"""Public entry of the gated residual."""

from __future__ import annotations

from torch import Tensor

from turbokernels import dispatch
from turbokernels.checks import check_modulation
from turbokernels.fused_gate_residual import reference

IMPLEMENTATIONS = {"reference": reference.gate_residual}


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, impl: str = "auto") -> Tensor:
    """x + y * gate, (B, L, C) in x's dtype.

    x: the residual stream (B, L, C); y: the branch's output (B, L, C), any floating dtype (the stream is often wider);
    gate: (B, 1, C) or (B, L, C), any floating dtype; contiguous last dimension. Arithmetic is float32 (float64 for
    float64 x).
    Errors: ValueError when shapes, dtypes, devices or strides do not fit.
    Source: Wan's gated residual, arXiv 2503.20314.
    """
    if y.shape != x.shape:
        raise ValueError(f"gate_residual: y has shape {tuple(y.shape)}; expected x's shape {tuple(x.shape)}")
    check_modulation("gate_residual", x, y=y, gate=gate)
    return dispatch.choose("gate_residual", impl, x.device, IMPLEMENTATIONS)(x, y, gate)
