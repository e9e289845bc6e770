"""W8A8 linear: integer sums equal brute force bit for bit, the rest is one float32 epilogue."""

from __future__ import annotations

import pytest
import torch
from turbokernels.quantize.api import quantize_block, quantize_token
from turbokernels.w8a8 import reference
from turbokernels.w8a8.api import SCHEMES, WEIGHT_DTYPES, dequantize_weight, quantize_weight, w8a8_linear

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")),
]
FLOAT32_ROUNDING = 2.0**-24
# Tokens, inputs, outputs: odd everywhere, under and over one slice of exact float32 sums and one 128 tile.
SHAPES = [(1, 1, 1), (5, 37, 19), (33, 128, 40), (7, 1024, 8), (20, 1500, 24), (130, 300, 257)]


def operands(
    n_tokens: int, n_inputs: int, n_outputs: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n_inputs)
    x = torch.randn(n_tokens, n_inputs, generator=generator) * torch.rand(n_tokens, 1, generator=generator) * 5
    w = torch.randn(n_outputs, n_inputs, generator=generator)
    return x.to(device), w.to(device), torch.randn(n_outputs, generator=generator).to(device)


def brute_force(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.long()[:, None, :] * b.long()[None]).sum(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n_tokens", "n_inputs", "n_outputs"), SHAPES)
def test_integer_sums_are_exact(n_tokens: int, n_inputs: int, n_outputs: int, device: str) -> None:
    for extreme in (False, True):
        a = torch.randint(-127, 128, (n_tokens, n_inputs), dtype=torch.int8)
        b = torch.randint(-127, 128, (n_outputs, n_inputs), dtype=torch.int8)
        if extreme:  # every partial sum as long as it can get
            a, b = torch.full_like(a, -128), torch.full_like(b, -128)
        got = reference.product(a.float().to(device), b.to(device))
        assert torch.equal(got.cpu(), brute_force(a, b).float())


@pytest.mark.parametrize(("n_tokens", "n_inputs", "n_outputs"), SHAPES[:3])
def test_padding_for_tensor_cores_is_exact(n_tokens: int, n_inputs: int, n_outputs: int) -> None:
    """The GPU's route through `torch._int_mm`, which exists on CPU as well (and is slow there)."""
    a = torch.randint(-127, 128, (n_tokens, n_inputs), dtype=torch.int8)
    b = torch.randint(-127, 128, (n_outputs, n_inputs), dtype=torch.int8)
    got = reference._int8_product_cuda(a.float(), b)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), brute_force(a, b))


def test_integer_sums_survive_fast_float_modes() -> None:
    a, b = torch.randint(-127, 128, (9, 1000), dtype=torch.int8), torch.randint(-127, 128, (8, 1000), dtype=torch.int8)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(reference.product(a.float(), b), brute_force(a, b).float())
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n_tokens", "n_inputs", "n_outputs"), SHAPES)
def test_channel_scheme_is_its_formula(n_tokens: int, n_inputs: int, n_outputs: int, device: str) -> None:
    x, w, bias = operands(n_tokens, n_inputs, n_outputs, device)
    w_q, w_scale = quantize_weight(w, "int8_channel")
    x_q, x_scale = quantize_token(x)
    sums = brute_force(x_q.cpu(), w_q.cpu()).float().to(device)
    expected = sums * x_scale[:, None] * w_scale + bias
    assert torch.equal(w8a8_linear(x, w_q, w_scale, bias, "int8_channel"), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("n_tokens", "n_inputs", "n_outputs"), SHAPES)
def test_near_the_float64_product_of_what_the_integers_stand_for(
    n_tokens: int, n_inputs: int, n_outputs: int, scheme: str, device: str
) -> None:
    if scheme == "fp8_channel" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 tensor cores need compute capability 8.9")
    x, w, bias = operands(n_tokens, n_inputs, n_outputs, device)
    w_q, w_scale = quantize_weight(w, scheme)
    if scheme == "int8_block128":
        x_q, x_scale = quantize_block(x)
        x_hat = dequantize_weight(x_q, x_scale, scheme)
    else:
        x_q, x_scale = quantize_token(x, WEIGHT_DTYPES[scheme])
        x_hat = dequantize_weight(x_q, x_scale, scheme)
    w_hat = dequantize_weight(w_q, w_scale, scheme)
    exact = x_hat.double() @ w_hat.double().t() + bias.double()
    plain = (x_hat @ w_hat.t() + bias - exact).norm()
    error = (w8a8_linear(x, w_q, w_scale, bias, scheme) - exact).norm()
    # The dequantised operands carry a rounding each themselves, and the result one.
    bound = 2 * plain + 3 * FLOAT32_ROUNDING * exact.norm()
    if scheme == "fp8_channel" and device == "cuda":
        # Hopper's fp8 units align products to 13 fraction bits of the largest before they add (arXiv 2412.19437, 3.3.2).
        bound = bound + 2.0**-14 * (x_hat.double().abs() @ w_hat.double().abs().t()).norm()
    assert error <= bound
    # And it is the float layer to 8 bits: relative error of a dot product of values rounded to 1/127 of the largest.
    float_result = x.double() @ w.double().t() + bias.double()
    assert (exact - float_result).norm() < 0.06 * float_result.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_result_has_the_dtype_and_leading_dims_of_x(scheme: str, dtype: torch.dtype) -> None:
    x, w, bias = operands(12, 40, 16, "cpu")
    w_q, w_scale = quantize_weight(w, scheme)
    x = x.to(dtype)
    full = w8a8_linear(x, w_q, w_scale, bias, scheme)
    assert full.dtype == dtype
    assert full.shape == (12, 16)
    assert w8a8_linear(x[0], w_q, w_scale, bias, scheme).shape == (16,)
    if scheme != "int8_block128":  # tiles follow the sample's tokens
        assert torch.equal(w8a8_linear(x.view(2, 3, 2, 40), w_q, w_scale, bias, scheme), full.view(2, 3, 2, 16))
    # One rounding from the float32 result.
    wide = w8a8_linear(x.float(), w_q, w_scale, bias, scheme)
    assert torch.equal(full, wide.to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_batch_equals_its_samples(scheme: str) -> None:
    x = torch.randn(3, 150, 140)
    w_q, w_scale = quantize_weight(torch.randn(20, 140), scheme)
    together = w8a8_linear(x, w_q, w_scale, scheme=scheme)
    for b in range(3):
        alone = w8a8_linear(x[b : b + 1], w_q, w_scale, scheme=scheme)
        if scheme == "fp8_channel":  # float sums: the order may depend on the shape
            assert (together[b : b + 1] - alone).norm() <= 140 * FLOAT32_ROUNDING * alone.norm()
        else:
            assert torch.equal(together[b : b + 1], alone)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strided_operands_and_autocast(scheme: str) -> None:
    x, w, bias = operands(12, 40, 16, "cpu")
    w_q, w_scale = quantize_weight(w, scheme)
    expected = w8a8_linear(x, w_q, w_scale, bias, scheme)
    assert torch.equal(w8a8_linear(x.t().contiguous().t(), w_q, w_scale, bias, scheme), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(w8a8_linear(x, w_q, w_scale, bias, scheme), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n_inputs", [40, 1500])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tokens_show(scheme: str, n_inputs: int, value: float) -> None:
    x = torch.randn(2, 3, n_inputs)
    x[1, 2, 4] = value
    w_q, w_scale = quantize_weight(torch.randn(16, n_inputs), scheme)
    y = w8a8_linear(x, w_q, w_scale, scheme=scheme)
    assert not y[1, 2].isfinite().any()
    assert y[0].isfinite().all()


def test_empty_batch() -> None:
    for scheme in SCHEMES:
        w_q, w_scale = quantize_weight(torch.randn(16, 40), scheme)
        assert w8a8_linear(torch.empty(2, 0, 40), w_q, w_scale, scheme=scheme).shape == (2, 0, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "int4"}, "int8_channel"),
        ({"scheme": "fp8_channel"}, "quantise it with quantize_weight"),
        ({"scheme": "int8_block128"}, "float32 \\(1, 1\\)"),
        ({"w_q": torch.ones(16, dtype=torch.int8)}, "shape"),
        ({"w_scale": torch.ones(15)}, "\\(15,\\)"),
        ({"w_scale": torch.ones(16, dtype=torch.bfloat16)}, "bfloat16"),
        ({"bias": torch.ones(3)}, "16 values"),
        ({"x": torch.ones(2, 39)}, "40"),
        ({"x": torch.ones(2, 40, dtype=torch.int8)}, "before quantisation"),
        ({"x": torch.ones(2, 40, requires_grad=True)}, "no_grad"),
        ({"x": torch.ones(2, 40, device="meta")}, "one device"),
        ({"impl": "triton"}, "impl='reference'"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    w_q, w_scale = quantize_weight(torch.randn(16, 40), "int8_channel")
    arguments = {"x": torch.ones(2, 40), "w_q": w_q, "w_scale": w_scale, "bias": None, "scheme": "int8_channel"}
    with pytest.raises(ValueError, match=message):
        w8a8_linear(**{**arguments, **changes})
