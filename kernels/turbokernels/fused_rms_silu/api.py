"""Public entry of the norm between the convolutions of a VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbokernels import dispatch
from turbokernels.checks import check_floating
from turbokernels.fused_rms_silu import reference


def _triton(*operands: Any) -> None:
    from turbokernels.fused_rms_silu import kernel  # here, so that the library imports without Triton

    kernel.rms_norm_silu(*operands)


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.rms_norm_silu}


@torch.no_grad()
def rms_norm_silu(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """x += residual, where there is one, and silu(RMSNorm(x) * weight), which is returned.

    x: (B, ..., C), contiguous, overwritten if there is a residual; residual: like x; weight: (C), any floating dtype. out: where
    the result is written, of x's shape and dtype, each sample contiguous (a stretch of a longer buffer, say); None: a new
    tensor. Arithmetic is float32 (float64 for float64 x); the norm is of the sum as it is stored. It divides by the root
    of the mean square over C without an eps, but at least by 1e-12 / sqrt(C). For inference: no gradient.
    Errors: ValueError when shapes, dtypes, devices or strides do not fit.
    Source: WanRMS_norm and SiLU of Wan's VAE, arXiv 2503.20314.
    """
    op = "rms_norm_silu"
    if x.ndim < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (batch, ..., channels)")
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    for name, tensor in {"residual": residual, "out": out}.items():
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected x's shape {tuple(x.shape)}")
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"{op}: weight is {tuple(weight.shape)} on {weight.device}; expected ({x.shape[-1]},) on {x.device}"
        )
    check_floating(op, x=x, out=out, **({} if residual is None else {"residual": residual}))
    if not x.is_contiguous() or not (residual is None or residual.is_contiguous()) or not out[:1].is_contiguous():
        raise ValueError(f"{op}: x, residual and each sample of out must be contiguous: pass .contiguous() tensors")
    x_BLC, out_BLC = (tensor.flatten(1, -2) if tensor.ndim > 2 else tensor[:, None] for tensor in (x, out))
    residual_BLC = None if residual is None else residual.view_as(x_BLC)
    run = dispatch.choose(op, impl, x.device, IMPLEMENTATIONS)
    run(x_BLC, weight, residual_BLC, out_BLC)
    return out
