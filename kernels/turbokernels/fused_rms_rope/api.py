"""Public entry of RMSNorm + RoPE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbokernels import dispatch
from turbokernels.checks import check_floating
from turbokernels.fused_rms_rope import reference


def _triton(*operands: Any) -> Tensor:
    from turbokernels.fused_rms_rope import kernel  # here, so that the library imports without Triton

    return kernel.rms_norm_rope(*operands)


def _triton_in_place(*operands: Any) -> Tensor:
    from turbokernels.fused_rms_rope import kernel

    return kernel.rms_norm_rope_(*operands)


def _reference_in_place(x: Tensor, *operands: Any) -> Tensor:
    return x.copy_(reference.rms_norm_rope(x, *operands))


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.rms_norm_rope}
IN_PLACE_IMPLEMENTATIONS = {"triton": _triton_in_place, "reference": _reference_in_place}


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
    *,
    in_place: bool = False,
) -> Tensor:
    """RMSNorm over all heads and channels of a token, then RoPE on neighbouring channel pairs; (B, L, N, D) in x's
    dtype.

    x: (B, L, N, D), contiguous last dimension, D even; weight: (N * D,); cos, sin: (L, D / 2), the rotation of each
    token and pair, or None and None for the norm alone. Arithmetic is float32 (float64 for float64 x), rounded once at the end.
    in_place: for inference; x, packed or not, is overwritten and returned, which saves memory of its size.
    Errors: ValueError when shapes, dtypes, devices or strides do not fit, or what is overwritten requires grad.
    Source: Wan's query and key normalisation, arXiv 2503.20314.
    """
    op = "rms_norm_rope"
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (batch, tokens, heads, even head dim)")
    check_floating(op, x=x)
    _, length, heads, head_dim = x.shape
    expected = {"weight": (heads * head_dim,), "cos": (length, head_dim // 2), "sin": (length, head_dim // 2)}
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: {'cos' if cos is None else 'sin'} is missing; pass cos and sin together, or neither")
    for name, tensor in {"weight": weight, "cos": cos, "sin": sin}.items():
        if tensor is None:
            continue
        check_floating(op, **{name: tensor})
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; expected {expected[name]} for x {tuple(x.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x is on {x.device}; move them to one device")
    if in_place and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise ValueError(f"{op}: in_place overwrites what a gradient needs; use no_grad(), or leave in_place out")
    table = IN_PLACE_IMPLEMENTATIONS if in_place else IMPLEMENTATIONS
    return dispatch.choose(op, impl, x.device, table)(x, weight, cos, sin, eps)
