"""Public entries of W8A8 linear layers: quantise a weight, multiply by it, and turn it back into floats.

Schemes (method.md section 7):
`int8_channel`   int8, weight scale per output channel, activation scale per token (default: scales leave the sum
over K).
`int8_block128`  int8, scales per 128 x 128 tile of both operands (published `-quant.pth` files).
`fp8_channel`    float8 e4m3, scales as in int8_channel (GPU: sm89 or newer).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbokernels import dispatch
from turbokernels.checks import FLOAT_DTYPES
from turbokernels.quantize.api import ACTIVATIONS, quantize_block, quantize_channel
from turbokernels.w8a8 import reference

WEIGHT_DTYPES = {"int8_channel": torch.int8, "int8_block128": torch.int8, "fp8_channel": torch.float8_e4m3fn}
SCHEMES = tuple(WEIGHT_DTYPES)
# Longer sums of int8 products (up to 2^14 each) could leave int32.
MAX_FEATURES = 2**31 // 2**14 - 1


def _triton(*operands: Any) -> Tensor:
    from turbokernels.w8a8 import kernel  # here, so that the library imports without Triton

    return kernel.w8a8_linear(*operands)


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.w8a8_linear}


def check_scheme(op: str, scheme: str) -> None:
    """Require a scheme that exists."""
    if scheme not in WEIGHT_DTYPES:
        raise ValueError(f"{op}: scheme={scheme!r} is not known; use one of {', '.join(SCHEMES)}")


def scale_shape(scheme: str, out_features: int, in_features: int) -> tuple[int, ...]:
    """Shape of a weight's scales: one per output channel, or one per 128 x 128 tile (the last tiles may be ragged)."""
    check_scheme("scale_shape", scheme)
    if scheme == "int8_block128":
        return (-(-out_features // reference.BLOCK), -(-in_features // reference.BLOCK))
    return (out_features,)


def quantize_weight(w: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Quantise a weight w (N, K): values (N, K) of the scheme's type, float32 scales of `scale_shape`."""
    check_scheme("quantize_weight", scheme)
    if scheme == "int8_block128":
        return quantize_block(w, reference.BLOCK)
    return quantize_channel(w, WEIGHT_DTYPES[scheme])


def _check_weight(op: str, w_q: Tensor, w_scale: Tensor, scheme: str) -> None:
    check_scheme(op, scheme)
    if w_q.dtype != WEIGHT_DTYPES[scheme]:
        raise ValueError(
            f"{op}: the weight has dtype {w_q.dtype}; "
            f"{scheme} expects {WEIGHT_DTYPES[scheme]}: quantise it with quantize_weight"
        )
    if w_q.ndim != 2 or not 1 <= w_q.shape[1] <= MAX_FEATURES:
        raise ValueError(
            f"{op}: the weight has shape {tuple(w_q.shape)}; expected (out, in) with 1 to {MAX_FEATURES} input features"
        )
    expected = scale_shape(scheme, *w_q.shape)
    if w_scale.dtype != torch.float32 or tuple(w_scale.shape) != expected:
        raise ValueError(
            f"{op}: the scale is {w_scale.dtype} {tuple(w_scale.shape)}; {scheme} expects float32 {expected} for "
            f"a weight {tuple(w_q.shape)}: quantise with quantize_weight, and use the scheme it was made with"
        )


def dequantize_weight(w_q: Tensor, w_scale: Tensor, scheme: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float weight (N, K) that 8-bit values and their scales stand for, computed in float32 and cast to `dtype`.

    Errors: ValueError for an unknown scheme, and for a dtype or shape that does not fit it.
    """
    _check_weight("dequantize_weight", w_q, w_scale, scheme)
    if scheme == "int8_block128":
        rows_NU = w_scale.repeat_interleave(reference.BLOCK, 0)[: w_q.shape[0]]
        scale_NK = rows_NU.repeat_interleave(reference.BLOCK, 1)[:, : w_q.shape[1]]
    else:
        scale_NK = w_scale[:, None]
    return (w_q.float() * scale_NK).to(dtype)


def _check_quantised(op: str, x: tuple[Tensor, Tensor], scheme: str) -> None:
    """Require values and scales that `quantize_token` (int8_block128: `quantize_block`) makes for `scheme`."""
    values, scale = x
    if values.dtype != WEIGHT_DTYPES[scheme] or scale.dtype != torch.float32:
        raise ValueError(
            f"{op}: x is quantised to {values.dtype} with {scale.dtype} scales; {scheme} expects "
            f"{WEIGHT_DTYPES[scheme]} and torch.float32"
        )
    expected = tuple(values.shape[:-1])
    if scheme == "int8_block128":
        expected = (*expected[:-1], *(-(-size // reference.BLOCK) for size in values.shape[-2:]))
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"{op}: x has values {tuple(values.shape)} and scales {tuple(scale.shape)}; {scheme} expects scales {expected}"
        )


def w8a8_linear(
    x: Tensor | tuple[Tensor, Tensor],
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    scheme: str = "int8_channel",
    impl: str = "auto",
    *,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = activation(dequantised(quantised(x)) @ dequantised(w_q)^T + bias), multiplied in 8 bits; (..., N).

    x: (..., K) floating, any leading dimensions and strides, quantised here; or (values, scale) from `quantize_token`
    (int8_block128: `quantize_block`), so that one quantisation serves several linears or is part of what produced x.
    w_q (N, K) and w_scale from `quantize_weight`; bias (N,) or None; activation: None or "gelu_tanh". int8 sums are
    exact; scales, bias and activation are applied in float32. The result has out_dtype, by default x's (values and
    scale need it said). A NaN or Inf in a token makes that token's (int8_block128: that tile's) result non-finite.
    Errors: ValueError for an unknown scheme, activation or impl, operands that do not fit each other, and an x that
    requires grad: rounding has no useful gradient, so this op is for inference.
    Source: method.md section 7.
    """
    op = "w8a8_linear"
    _check_weight(op, w_q, w_scale, scheme)
    values = x if isinstance(x, Tensor) else x[0]
    if values.ndim < 1 or values.shape[-1] != w_q.shape[1]:
        raise ValueError(
            f"{op}: x has shape {tuple(values.shape)}; its last dimension must be {w_q.shape[1]}, the weight's inputs"
        )
    if not isinstance(x, Tensor):
        _check_quantised(op, x, scheme)
        if out_dtype is None:
            raise ValueError(f"{op}: x is quantised already, so it has no dtype for the result: pass out_dtype")
    elif x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{op}: x has dtype {x.dtype}; expected a float type: pass the activations before quantisation, or values "
            "and scale"
        )
    out_dtype = out_dtype or values.dtype
    if out_dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: out_dtype={out_dtype} is not a float type; use float16, bfloat16, float32 or float64")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation={activation!r} is not known; use one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    if bias is not None and (tuple(bias.shape) != (w_q.shape[0],) or bias.dtype not in FLOAT_DTYPES):
        raise ValueError(
            f"{op}: bias is {bias.dtype} {tuple(bias.shape)}; expected a float vector of {w_q.shape[0]} values"
        )
    others = {"w_q": w_q, "w_scale": w_scale, "bias": bias, "x's scale": None if isinstance(x, Tensor) else x[1]}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != values.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x is on {values.device}; move them to one device")
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: x requires grad, but 8-bit linears are for inference; "
            "use torch.no_grad(), or dequantise the model to train it"
        )
    function = dispatch.choose(op, impl, values.device, IMPLEMENTATIONS)
    if values.ndim > 1:
        return function(x, w_q, w_scale, bias, scheme, activation, out_dtype)
    row = x[None] if isinstance(x, Tensor) else (x[0][None], x[1][None])
    return function(row, w_q, w_scale, bias, scheme, activation, out_dtype)[0]
