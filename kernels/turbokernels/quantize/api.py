"""Public entries of 8-bit quantisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbokernels import dispatch
from turbokernels.checks import FLOAT_DTYPES
from turbokernels.quantize import reference

ACTIVATIONS = (None, "gelu_tanh")


def _triton_rows(*operands: Any) -> tuple[Tensor, Tensor]:
    from turbokernels.quantize import kernel  # here, so that the library imports without Triton

    return kernel.quantize_rows(*operands)


def _triton_block(*operands: Any) -> tuple[Tensor, Tensor]:
    from turbokernels.quantize import kernel

    return kernel.quantize_block(*operands)


ROW_IMPLEMENTATIONS = {"triton": _triton_rows, "reference": reference.quantize_rows}
BLOCK_IMPLEMENTATIONS = {"triton": _triton_block, "reference": reference.quantize_block}


def _check(op: str, x: Tensor, min_dims: int) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: the input has dtype {x.dtype}; expected a float type: cast it first")
    if x.ndim < min_dims or x.shape[-1] == 0:
        raise ValueError(
            f"{op}: the input has shape {tuple(x.shape)}; expected at least {min_dims} dimension(s) and one feature"
        )


def _check_before(op: str, x: Tensor, activation: str | None, smooth: Tensor | None) -> None:
    """Require an activation that exists, and a smoothing vector of x's features."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation={activation!r} is not known; use one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    if smooth is None:
        return
    if tuple(smooth.shape) != (x.shape[-1],) or smooth.dtype != torch.float32 or smooth.stride(0) != 1:
        raise ValueError(
            f"{op}: smooth is {smooth.dtype} {tuple(smooth.shape)}; expected a packed float32 vector of {x.shape[-1]}"
        )
    if smooth.device != x.device:
        raise ValueError(f"{op}: smooth is on {smooth.device} but x is on {x.device}; move them to one device")


def check_dtype(op: str, dtype: torch.dtype) -> None:
    """Require an 8-bit type that a scheme has."""
    if dtype not in reference.LIMITS:
        raise ValueError(f"{op}: dtype={dtype} is not an 8-bit type of a scheme; use torch.int8 or torch.float8_e4m3fn")


def quantize_token(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    impl: str = "auto",
    *,
    activation: str | None = None,
    smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise activations per token: x (..., K) -> values (..., K) of `dtype`, float32 scale (...); x ~ values *
    scale[..., None].

    int8: scale = amax / 127, round half to even, values in +-127. float8_e4m3fn: scale = amax / 448. A zero token
    gets scale 1. What is quantised is activation(x) / smooth, in float32, without rounding to x's dtype in between:
    activation None or "gelu_tanh", smooth None or a positive float32 vector (K,) (SmoothQuant's, arXiv 2211.10438,
    whose weight was multiplied by it). No gradient.
    Errors: ValueError for an input that is not floating or has no features, a vector that does not fit, an unknown
    dtype, activation or impl.
    Source: method.md section 7.
    """
    op = "quantize_token"
    _check(op, x, 1)
    check_dtype(op, dtype)
    _check_before(op, x, activation, smooth)
    return dispatch.choose(op, impl, x.device, ROW_IMPLEMENTATIONS)(x, dtype, activation, smooth)


def quantize_channel(w: Tensor, dtype: torch.dtype = torch.int8, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantise a weight per output channel: w (N, K) -> values (N, K) of `dtype`, float32 scale (N,). As
    `quantize_token`.
    """
    _check("quantize_channel", w, 2)
    check_dtype("quantize_channel", dtype)
    return dispatch.choose("quantize_channel", impl, w.device, ROW_IMPLEMENTATIONS)(w, dtype)


def quantize_block(
    x: Tensor,
    block: int = 128,
    impl: str = "auto",
    *,
    activation: str | None = None,
    smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise in tiles: x (..., L, K) -> int8 (..., L, K), float32 scale (..., ceil(L / block), ceil(K / block)).

    scale = amax / 128, values = clamp(round(x / scale), -128, 127); the last tiles may be ragged; a zero tile gets
    scale 1. Tiles never span two samples: the leading dimensions are quantised one by one, so a batch equals its
    samples. activation and smooth: as in `quantize_token`. No gradient. Errors: ValueError for an input that is not
    floating, has under two dimensions or no features, block < 1, and as `quantize_token` for activation and smooth.
    Source: method.md section 7, formats.md section 4 (layout of published `-quant.pth` files).
    """
    op = "quantize_block"
    _check(op, x, 2)
    if block < 1:
        raise ValueError(f"{op}: block={block}; expected at least 1 (published files use 128)")
    _check_before(op, x, activation, smooth)
    return dispatch.choose(op, impl, x.device, BLOCK_IMPLEMENTATIONS)(x, block, activation, smooth)
