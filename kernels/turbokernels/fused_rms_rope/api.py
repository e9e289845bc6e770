"""Public entry of RMSNorm + RoPE."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from turbokernels import dispatch
from turbokernels.checks import check_floating
from turbokernels.fused_rms_rope import reference


def _triton(*operands: Any) -> Tensor:
    from turbokernels.fused_rms_rope import kernel  # here, so that the library imports without Triton

    return kernel.rms_norm_rope(*operands)


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.rms_norm_rope}


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """RMSNorm over all heads and channels of a token, then RoPE on neighbouring channel pairs; (B, L, N, D) in x's
    dtype.

    x: (B, L, N, D), contiguous last dimension, D even; weight: (N * D,); cos, sin: (L, D / 2), the rotation of each
    token and pair, or None and None for the norm alone. Arithmetic is float32 (float64 for float64 x), rounded once at the end.
    Errors: ValueError when shapes, dtypes, devices or strides do not fit.
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
    return dispatch.choose(op, impl, x.device, IMPLEMENTATIONS)(x, weight, cos, sin, eps)
