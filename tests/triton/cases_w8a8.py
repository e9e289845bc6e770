"""W8A8 linear kernels against the reference, on any device; run by tests/triton and tests/gpu."""

from __future__ import annotations

import torch
from torch import Tensor
from turbokernels import quantize_block, quantize_token, w8a8_linear
from turbokernels.testing import assert_within_budget
from turbokernels.w8a8.api import WEIGHT_DTYPES, dequantize_weight, quantize_weight


def operands(
    shape: tuple[int, ...], n_out: int, dtype: torch.dtype, scheme: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with tokens of different size and an outlier channel, a quantised weight and its scales, a bias."""
    x = torch.randn(shape) * (0.1 + 5 * torch.rand(*shape[:-1], 1))
    x[..., -1] *= 30
    return x.to(dtype), *quantize_weight(torch.randn(n_out, shape[-1]), scheme), torch.randn(n_out).to(dtype)


def quantise(x: Tensor, scheme: str, impl: str = "auto") -> tuple[Tensor, Tensor]:
    if scheme == "int8_block128":
        return quantize_block(x, impl=impl)
    return quantize_token(x, WEIGHT_DTYPES[scheme], impl=impl)


def check_linear(
    shape: tuple[int, ...],
    n_out: int,
    scheme: str,
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool = True,
    activation: str | None = None,
) -> None:
    """The kernel stands to the float64 product of what the 8-bit operands mean as the reference does."""
    x, w_q, w_scale, b = operands(shape, n_out, dtype, scheme)
    given = b if bias else None
    arguments = [x, w_q, w_scale, given, scheme]
    got = w8a8_linear(
        *(t.to(device) if isinstance(t, Tensor) else t for t in arguments), "triton", activation=activation
    )
    plain = w8a8_linear(*arguments, "reference", activation=activation)
    assert got.dtype == dtype
    assert got.shape == plain.shape
    q, scale = quantise(x, scheme, "reference")
    if scheme == "int8_block128":
        rows = scale.repeat_interleave(128, -2)[..., : q.shape[-2], :]
        scale_MK = rows.repeat_interleave(128, -1)[..., : q.shape[-1]]
    else:
        scale_MK = scale[..., None]
    exact = q.double() * scale_MK.double() @ dequantize_weight(w_q, w_scale, scheme, torch.float64).t()
    exact = exact if given is None else exact + given.double()
    if activation:
        exact = torch.nn.functional.gelu(exact, approximate="tanh")
    assert_within_budget(got.cpu(), plain, exact)
    if scheme == "int8_channel" and activation is None:
        assert torch.equal(got.cpu(), plain)  # exact sums, and the same epilogue rounding by rounding


def check_given_quantised(scheme: str, device: str) -> None:
    """Values and scales from the quantizer give what x gives, as slices of something wider too."""
    x, w_q, w_scale, bias = (t.to(device) for t in operands((2, 37, 80), 48, torch.float32, scheme))
    expected = w8a8_linear(x, w_q, w_scale, bias, scheme, "triton")
    values, scale = quantise(x, scheme, "triton")
    got = w8a8_linear((values, scale), w_q, w_scale, bias, scheme, "triton", out_dtype=torch.float32)
    assert torch.equal(got, expected)
    wide = torch.zeros(2, 37, 160, dtype=torch.uint8, device=device).view(values.dtype)
    wide[..., 80:].copy_(values)
    got = w8a8_linear((wide[..., 80:], scale), w_q, w_scale, bias, scheme, "triton", out_dtype=torch.float32)
    assert torch.equal(got, expected)
    half = w8a8_linear((values, scale), w_q, w_scale, bias, scheme, "triton", out_dtype=torch.float16)
    assert torch.equal(half, expected.half())


def check_non_finite(scheme: str, device: str) -> None:
    x, w_q, w_scale, bias = operands((2, 3, 200), 16, torch.float32, scheme)
    x[1, 2, 4], x[1, 1, 130] = float("nan"), float("inf")
    y = w8a8_linear(*(t.to(device) for t in (x, w_q, w_scale, bias)), scheme, "triton").cpu()
    assert not y[1, 1:].isfinite().any()
    assert y[0].isfinite().all()


def check_empty_and_single(scheme: str, device: str) -> None:
    x, w_q, w_scale, bias = (t.to(device) for t in operands((2, 1, 40), 16, torch.float32, scheme))
    assert w8a8_linear(x[:, :0], w_q, w_scale, bias, scheme, "triton").shape == (2, 0, 16)
    row = w8a8_linear(x[0, 0], w_q, w_scale, bias, scheme, "triton")
    assert torch.equal(row, w8a8_linear(x, w_q, w_scale, bias, scheme, "triton")[0, 0])
