"""Element-wise kernels against the reference and float64, on any device; run by tests/triton and tests/gpu."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import turbokernels as tk
from torch import Tensor
from turbokernels.testing import assert_within_budget


def stream(batch: int, length: int, width: int, dtype: torch.dtype) -> Tensor:
    """Tokens with a mean, of different size, some with an outlier channel."""
    x = torch.randn(batch, length, width) * torch.logspace(-1, 1, length)[:, None] + 0.5
    x[:, ::2, 1 % width] *= 100
    return x.to(dtype)


def modulation(batch: int, length: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, length, width).to(dtype)


def check_within_budget(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    assert got.dtype == plain.dtype
    assert_within_budget(got.cpu(), plain, exact)


def check_norm(batch: int, length: int, width: int, per_token: bool, dtype: torch.dtype, device: str) -> None:
    x = stream(batch, length, width, dtype)
    scale, shift = (modulation(batch, length if per_token else 1, width, torch.float32) for _ in range(2))
    got = tk.layer_norm_modulate(x.to(device), scale.to(device), shift.to(device), impl="triton")
    plain = tk.layer_norm_modulate(x, scale, shift, impl="reference")
    exact = tk.layer_norm_modulate(x.double(), scale.double(), shift.double(), impl="reference")
    check_within_budget(got, plain, exact)
    if not per_token:
        check_affine_norm(x, scale, shift, device)


def check_affine_norm(x: Tensor, weight: Tensor, bias: Tensor, device: str) -> None:
    """Weights and biases instead of modulation, alone and after a residual without gate; small weights keep their bits."""
    weight, bias, y = weight * 1e-3, bias * 1e-3, torch.randn_like(x)
    operands = (x, y, weight, bias)
    on_device, wide = tuple(t.to(device) for t in operands), tuple(t.double() for t in operands)
    got = tk.layer_norm_modulate(on_device[0], *on_device[2:], impl="triton", affine=True)
    plain = tk.layer_norm_modulate(x, weight, bias, impl="reference", affine=True)
    exact = tk.layer_norm_modulate(wide[0], *wide[2:], impl="reference", affine=True)
    check_within_budget(got, plain, exact)
    out, h = tk.gate_residual_norm(*on_device[:2], None, *on_device[2:], impl="triton", affine=True)
    assert torch.equal(out, (on_device[0].float() + on_device[1].float()).to(x.dtype))
    assert torch.equal(h, tk.layer_norm_modulate(out, *on_device[2:], impl="triton", affine=True))
    _, q, token_scale = tk.gate_residual_norm_quantize(*on_device[:2], None, *on_device[2:], impl="triton", affine=True)
    expected = tk.layer_norm_modulate_quantize(out, *on_device[2:], impl="triton", affine=True)
    # Two launches, whose sums are ordered and contracted differently: a value beside a tie may go to its neighbour.
    torch.testing.assert_close(token_scale, expected[1], rtol=8 * torch.finfo(torch.float32).eps, atol=0.0)
    differences = (q.int() - expected[0].int()).abs()
    assert differences.max() <= 1
    assert differences.float().mean() < 1e-4


def check_gate(
    batch: int, length: int, width: int, per_token: bool, dtype: torch.dtype, branch: torch.dtype, device: str
) -> None:
    """Gated residual alone and with the norm, a stream and a branch of the same or of different dtypes."""
    x, y = stream(batch, length, width, dtype), modulation(batch, length, width, branch)
    gate, scale, shift = (modulation(batch, length if per_token else 1, width, torch.float32) for _ in range(3))
    operands = (x, y, gate, scale, shift)
    on_device, wide = tuple(t.to(device) for t in operands), tuple(t.double() for t in operands)
    alone = tk.gate_residual(*on_device[:3], impl="triton")
    plain, exact = tk.gate_residual(*operands[:3], impl="reference"), tk.gate_residual(*wide[:3], impl="reference")
    check_within_budget(alone, plain, exact)
    out, h = tk.gate_residual_norm(*on_device, impl="triton")
    assert torch.equal(out, alone)
    _, plain_h = tk.gate_residual_norm(*operands, impl="reference")
    # The norm is of the stream as it is stored.
    exact_h = tk.layer_norm_modulate(out.cpu().double(), *wide[3:], impl="reference")
    check_within_budget(h, plain_h, exact_h)


def check_quantised(
    got: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor], exact: Tensor, target: torch.dtype
) -> None:
    """8-bit values: scales to a few roundings, integers that differ by one where float32 sums move a tie."""
    (q, scale), (plain_q, plain_scale) = (tuple(t.cpu() for t in pair) for pair in (got, plain))
    assert q.dtype == plain_q.dtype == target
    assert scale.dtype == torch.float32
    assert scale.shape == plain_scale.shape
    assert ((scale - plain_scale).abs() <= 2.0**-18 * plain_scale).all()
    assert (q.float() != plain_q.float()).float().mean() < 2e-3
    dequantised = [values.float() * scales[..., None] for values, scales in ((q, scale), (plain_q, plain_scale))]
    assert_within_budget(*dequantised, exact)


def check_quantised_norms(batch: int, length: int, width: int, target: torch.dtype, device: str) -> None:
    x, y = stream(batch, length, width, torch.float16), modulation(batch, length, width, torch.float16)
    gate, scale, shift = (modulation(batch, 1, width, torch.float32) for _ in range(3))
    operands = (x, y, gate, scale, shift)
    on_device = tuple(t.to(device) for t in operands)
    got = tk.layer_norm_modulate_quantize(on_device[0], *on_device[3:], dtype=target, impl="triton")
    plain = tk.layer_norm_modulate_quantize(x, scale, shift, dtype=target, impl="reference")
    exact = tk.layer_norm_modulate(x.double(), scale.double(), shift.double(), impl="reference")
    check_quantised(got, plain, exact, target)
    out, *got_pair = tk.gate_residual_norm_quantize(*on_device, dtype=target, impl="triton")
    assert torch.equal(out, tk.gate_residual(*on_device[:3], impl="triton"))
    plain = tk.layer_norm_modulate_quantize(out.cpu(), scale, shift, dtype=target, impl="reference")
    exact = tk.layer_norm_modulate(out.cpu().double(), scale.double(), shift.double(), impl="reference")
    check_quantised((got_pair[0], got_pair[1]), plain, exact, target)


def check_rope(batch: int, length: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    x = stream(batch, length, heads * head_dim, dtype).unflatten(2, (heads, head_dim))
    weight, angle = torch.randn(heads * head_dim), torch.randn(length, head_dim // 2, dtype=torch.float64)
    cos, sin = angle.cos().float(), angle.sin().float()
    plain = tk.rms_norm_rope(x, weight, cos, sin, impl="reference")
    exact = tk.rms_norm_rope(x.double(), weight.double(), cos.double(), sin.double(), impl="reference")
    tables = tuple(t.to(device) for t in (weight, cos, sin))
    unturned = [tk.rms_norm_rope(t, w, impl="reference") for t, w in ((x, weight), (x.double(), weight.double()))]
    check_within_budget(tk.rms_norm_rope(x.to(device), tables[0], impl="triton"), unturned[0], unturned[1])
    # Packed; one of three in a packed projection; heads that do not follow one another.
    packed = torch.full((batch, length, 3, heads, head_dim), float("nan"), dtype=dtype, device=device)
    apart = torch.full((batch, heads, length, head_dim + 6), float("nan"), dtype=dtype, device=device)
    views = (packed[:, :, 0].contiguous(), packed[:, :, 1], apart.transpose(1, 2)[..., 2 : head_dim + 2])
    for view in views:
        view.copy_(x)
        got = tk.rms_norm_rope(view, *tables, impl="triton")
        check_within_budget(got, plain, exact)
        if view is not views[2]:
            assert tk.rms_norm_rope(view, *tables, impl="triton", in_place=True) is view
            assert torch.equal(view, got)
    assert packed[:, :, ::2].isnan().all()  # its neighbours are left alone
    with pytest.raises(ValueError, match="in place its heads must follow one another"):
        tk.rms_norm_rope(views[2], *tables, impl="triton", in_place=True)


def check_strides(device: str) -> None:
    """Slices of something larger, and modulation that is one of six in a table."""
    x, y = (torch.randn(3, 12, 96, device=device)[:2, 1:10, 32:80] for _ in range(2))
    table = torch.randn(2, 6, 48, device=device)
    operands = (x, y, *(table[:, i : i + 1] for i in (0, 3, 5)))
    packed = tuple(t.contiguous() for t in operands)
    for got, expected in zip(
        tk.gate_residual_norm(*operands, impl="triton"), tk.gate_residual_norm(*packed, impl="triton")
    ):
        assert torch.equal(got, expected)
    values = tk.layer_norm_modulate_quantize(x, *operands[3:], impl="triton")
    for got, expected in zip(values, tk.layer_norm_modulate_quantize(packed[0], *packed[3:], impl="triton")):
        assert torch.equal(got, expected)


def check_non_finite(device: str) -> None:
    """NaN stays in its token."""
    x, one = torch.randn(1, 5, 40, device=device), torch.randn(1, 1, 40, device=device)
    x[0, 2, 39] = float("nan")
    results = [tk.layer_norm_modulate(x, one, one, impl="triton"), tk.gate_residual(x, x, one, impl="triton")[..., 39:]]
    results.append(tk.layer_norm_modulate_quantize(x, one, one, impl="triton")[1][..., None])
    angle = torch.ones(5, 4, device=device)
    results.append(tk.rms_norm_rope(x.view(1, 5, 5, 8), one.flatten(), angle, angle, impl="triton").flatten(2))
    for result in results:
        assert result.isfinite().all(-1).flatten().tolist() == [True, True, False, True, True]
        assert not result[0, 2].isfinite().any()


def check_gradients(device: str) -> None:
    """A kernel's result, the reference's gradient; several results, shared modulation."""
    x, y = torch.randn(2, 1, 5, 8, device=device).unbind(0)
    gate, scale, shift = torch.randn(3, 1, 1, 8, device=device).unbind(0)
    operands = [t.clone().requires_grad_() for t in (x, y, gate, scale, shift)]
    weights = torch.randn(2, 1, 5, 8, device=device)
    calls: list[tuple[Callable[..., object], int]] = [(tk.gate_residual, 3), (tk.gate_residual_norm, 5)]
    for call, count in calls:
        gradients = []
        for impl in ("triton", "reference"):
            results = call(*operands[:count], impl=impl)
            results = results if isinstance(results, tuple) else (results,)
            total = sum((w * r).sum() for w, r in zip(weights, results))
            gradients.append(torch.autograd.grad(total, operands[:count]))
        for mine, its in zip(*gradients):
            torch.testing.assert_close(mine, its)


def check_tangents_are_refused(device: str) -> None:
    x = torch.randn(1, 5, 8, device=device)
    with pytest.raises(ValueError, match=r"gate_residual: the kernel has no tangent .* use impl='reference'"):
        torch.func.jvp(lambda x: tk.gate_residual(x, x, x, impl="triton"), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(ValueError, match="layer_norm_modulate: the kernel has no tangent"):
            tk.layer_norm_modulate(dual, x, x, impl="triton")


def check_no_graph_break(device: str, backend: str) -> None:
    x, y = torch.randn(2, 1, 9, 64, device=device).unbind(0)
    gate, scale, shift = torch.randn(3, 1, 1, 64, device=device).unbind(0)
    cos, sin = torch.randn(2, 9, 8, device=device).unbind(0)

    def block(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        h = tk.layer_norm_modulate(x, scale, shift, impl="triton")
        turned = tk.rms_norm_rope(h.unflatten(2, (4, 16)), scale.flatten(), cos, sin, impl="triton").flatten(2)
        out, normed = tk.gate_residual_norm(x, y, gate, scale, shift, impl="triton")
        stored, q, token_scale = tk.gate_residual_norm_quantize(out, normed, gate, scale, shift, impl="triton")
        return turned, tk.gate_residual(stored, h, gate, impl="triton"), q, token_scale

    torch._dynamo.reset()
    with torch.no_grad():
        for got, expected in zip(torch.compile(block, backend=backend, fullgraph=True)(x, y), block(x, y)):
            torch.testing.assert_close(got, expected)
