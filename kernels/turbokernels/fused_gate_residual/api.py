"""Public entries of the gated residual, alone or with the norm after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbokernels import dispatch
from turbokernels.checks import check_inference, check_modulation
from turbokernels.fused_gate_residual import reference
from turbokernels.quantize.api import check_dtype


def _triton(*operands: Any) -> Tensor:
    from turbokernels.fused_gate_residual import kernel  # here, so that the library imports without Triton

    return kernel.gate_residual(*operands)


def _triton_norm(*operands: Any) -> tuple[Tensor, Tensor]:
    from turbokernels.fused_gate_residual import kernel

    return kernel.gate_residual_norm(*operands)


def _triton_norm_quantize(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    from turbokernels.fused_gate_residual import kernel

    return kernel.gate_residual_norm_quantize(*operands)


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.gate_residual}
NORM_IMPLEMENTATIONS = {"triton": _triton_norm, "reference": reference.gate_residual_norm}
QUANTIZE_IMPLEMENTATIONS = {"triton": _triton_norm_quantize, "reference": reference.gate_residual_norm_quantize}


def _check(op: str, x: Tensor, y: Tensor, **modulation: Tensor | None) -> None:
    if y.shape != x.shape:
        raise ValueError(f"{op}: y has shape {tuple(y.shape)}; expected x's shape {tuple(x.shape)}")
    check_modulation(op, x, y=y, **{name: tensor for name, tensor in modulation.items() if tensor is not None})


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, impl: str = "auto") -> Tensor:
    """x + y * gate, (B, L, C) in x's dtype.

    x: the residual stream (B, L, C); y: the branch's output (B, L, C), any floating dtype (the stream is often wider);
    gate: (B, 1, C) or (B, L, C), any floating dtype; contiguous last dimension. Arithmetic is float32 (float64 for
    float64 x).
    Errors: ValueError when shapes, dtypes, devices or strides do not fit.
    Source: Wan's gated residual, arXiv 2503.20314.
    """
    _check("gate_residual", x, y, gate=gate)
    return dispatch.choose("gate_residual", impl, x.device, IMPLEMENTATIONS)(x, y, gate)


def gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    impl: str = "auto",
    *,
    affine: bool = False,
) -> tuple[Tensor, Tensor]:
    """out = `gate_residual(x, y, gate)` in x's dtype, and h = `layer_norm_modulate(out, scale, shift)` in y's dtype.

    The end of one branch and the start of the next in one pass: the stream is read and written once. gate None
    is a gate of 1. `affine`: h is the norm times scale alone, for an affine norm's weight and bias as (B, 1, C).
    Errors, operands, source: as those two.
    """
    _check("gate_residual_norm", x, y, gate=gate, scale=scale, shift=shift)
    run = dispatch.choose("gate_residual_norm", impl, x.device, NORM_IMPLEMENTATIONS)
    return run(x, y, gate, scale, shift, eps, affine)


def gate_residual_norm_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.int8,
    impl: str = "auto",
    *,
    affine: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gate_residual_norm` whose h is quantised per token: out, values (B, L, C) of `dtype`, float32 scale (B, L).

    What is quantised is the float32 h, without rounding to y's dtype in between. For inference.
    Errors: as `gate_residual_norm`, for another dtype than int8 and float8_e4m3fn, and operands that require grad.
    Source: method.md section 7.
    """
    op = "gate_residual_norm_quantize"
    _check(op, x, y, gate=gate, scale=scale, shift=shift)
    check_dtype(op, dtype)
    check_inference(op, x=x, y=y, scale=scale, shift=shift, **({} if gate is None else {"gate": gate}))
    run = dispatch.choose(op, impl, x.device, QUANTIZE_IMPLEMENTATIONS)
    return run(x, y, gate, scale, shift, eps, dtype, affine)
