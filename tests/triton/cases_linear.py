"""What linear attention's kernels must do, on any device: checked under the interpreter and on GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_oracles import random_operands, strided
from torch import Tensor
from turbokernels import add_linear_attention, add_linear_attention_jvp, linear_attention, linear_attention_jvp
from turbokernels.testing import assert_within_budget

FEATURE_MAPS = ("softmax", "elu", "relu")
NAMES = ("o", "to", "dq", "dk", "dv", "dbase", "dweight", "dbias")


def phi(x: Tensor, feature_map: str) -> Tensor:
    if feature_map == "softmax":
        return x.softmax(-1)
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp()) if feature_map == "elu" else x.clamp(min=0)


def explicit(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, feature_map: str) -> Tensor:
    """Every query-key weight phi(q_i) . phi(k_j) written out; no associativity used. What is exact in float64."""
    weight_BNQK = torch.einsum("bqnd,bknd->bnqk", phi(q_BLND, feature_map), phi(k_BLND, feature_map))
    total_BQN1 = weight_BNQK.sum(-1).transpose(1, 2).unsqueeze(-1)
    return torch.einsum("bnqk,bknd->bqnd", weight_BNQK, v_BLND) / (total_BQN1 + 1e-5)


def associative(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, feature_map: str) -> Tensor:
    """The same as a kernel must order it, in plain PyTorch: what the same precision may cost."""
    phi_q_BLND, phi_k_BLND = phi(q_BLND, feature_map), phi(k_BLND, feature_map)
    state_BNDE = torch.einsum("bknd,bkne->bnde", phi_k_BLND, v_BLND)
    total_BQN1 = torch.einsum("bqnd,bnd->bqn", phi_q_BLND, phi_k_BLND.sum(1)).unsqueeze(-1)
    return torch.einsum("bqnd,bnde->bqne", phi_q_BLND, state_BNDE) / (total_BQN1 + 1e-5)


def by_autograd(
    attend: Callable[..., Tensor],
    primals: list[Tensor],
    tangents: list[Tensor],
    do: Tensor,
    feature_map: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """o, to and the gradients of q, k, v (and of base, weight, bias, if given) of `attend`, computed in `dtype`."""

    def function(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        o = attend(q, k, v, feature_map)
        return o if not rest else rest[0] + torch.nn.functional.linear(o, *rest[1:])

    leaves = [x.to(dtype).requires_grad_() for x in primals]
    moved = [x.to(dtype) for x in tangents]
    moved += [torch.zeros_like(x) for x in leaves[len(moved) :]]
    _, to = torch.func.jvp(function, tuple(x.detach() for x in leaves), tuple(moved))
    o = function(*leaves)
    return (o.detach(), to, *torch.autograd.grad(o, leaves, do.to(dtype)))


def check_value_gradient_and_tangent(
    feature_map: str,
    batch: int,
    length_q: int,
    length_k: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
    *,
    with_sum: bool = False,
    outliers: bool = False,
) -> None:
    """Both entries, every output, against float64; `with_sum` adds a base and a projection."""
    q, k, v, tq, tk, tv, do = (x.to(device) for x in random_operands(batch, length_q, heads, dim, length_k))
    if outliers:
        q[..., 0] += 5.0
        k[..., 1] += 8.0
        v[..., 2] *= 30.0
    primals, tangents = [q, k, v], [tq, tk, tv]
    if with_sum:
        base, tbase, *_ = (x.to(device) for x in random_operands(batch, length_q, heads, dim))
        weight, bias = torch.randn(dim, dim, device=device) / dim**0.5, torch.randn(dim, device=device)
        primals, tangents = [*primals, base, weight, bias], [*tangents, tbase]
    primals, tangents, do = [x.to(dtype) for x in primals], [x.to(dtype) for x in tangents], do.to(dtype)
    oracle = explicit if max(length_q, length_k) < 4096 else associative  # every pair would not fit in memory
    exact = by_autograd(oracle, primals, tangents, do, feature_map, torch.float64)
    plain = by_autograd(associative, primals, tangents, do, feature_map, dtype)

    leaves = [x.clone().requires_grad_() for x in primals]
    if with_sum:
        leaves[4:] = [x.detach().float().requires_grad_() for x in leaves[4:]]  # P is float32
        q, k, v, base, weight, bias = leaves
        o = add_linear_attention(base, q, k, v, weight, bias, feature_map, impl="triton")
        more = (tangents[3], *leaves[:3], *tangents[:3], weight, bias)
        same_o, to = add_linear_attention_jvp(base, *more, feature_map, impl="triton")
    else:
        o = linear_attention(*leaves, feature_map, impl="triton")
        same_o, to = linear_attention_jvp(*leaves, *tangents, feature_map, impl="triton")
    assert not to.requires_grad
    got = (o.detach(), to, *torch.autograd.grad(o, leaves, do))
    for name, actual, plainly, exactly in zip(NAMES, got, plain, exact):
        assert actual.dtype == (torch.float32 if name in ("dweight", "dbias") else dtype)
        assert_within_budget(actual, plainly, exactly, name)
    # The entry with the tangent computes the same o, and passes its gradient on.
    assert_within_budget(same_o.detach(), plain[0], exact[0], "o with its tangent")
    for name, actual, plainly, exactly in zip(NAMES[2:], torch.autograd.grad(same_o, leaves, do), plain[2:], exact[2:]):
        assert_within_budget(actual, plainly, exactly, name)


def check_views_give_the_same_bits(device: str, dtype: torch.dtype) -> None:
    operands = [x.to(device) for x in random_operands(2, 63, 2, 16, dtype=dtype)[:6]]
    views = [strided(x.cpu()).to(device) if device == "cpu" else strided_on(x) for x in operands]
    expected = linear_attention_jvp(*operands, impl="triton")
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        got = linear_attention_jvp(*views, impl="triton")
    assert got[0].equal(expected[0])
    assert got[1].equal(expected[1])


def strided_on(x_BLND: Tensor) -> Tensor:
    """`strided` on x's device: the values as a view into something larger."""
    batch, length, heads, dim = x_BLND.shape
    store = torch.full((length, batch, 2 * heads, dim + 3), float("nan"), dtype=x_BLND.dtype, device=x_BLND.device)
    view = store.permute(1, 0, 2, 3)[:, :, ::2, 1 : dim + 1]
    view.copy_(x_BLND)
    return view


def check_expanded_gradient(device: str) -> None:
    """The gradient of a plain sum has stride 0 everywhere."""
    q, k, v, *_ = (x.to(device).requires_grad_() for x in random_operands(1, 40, 2, 16, dtype=torch.float32))
    got = torch.autograd.grad(linear_attention(q, k, v, impl="triton").sum(), (q, k, v))
    expected = torch.autograd.grad(linear_attention(q, k, v, impl="reference").sum(), (q, k, v))
    for actual, wanted in zip(got, expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def check_no_features(device: str) -> None:
    """relu can leave phi(q) = 0: the 1e-5 in the denominator keeps 0 / 0 away, in the backward as well."""
    _, k, v, *_ = (x.to(device) for x in random_operands(1, 40, 1, 16, dtype=torch.float16))
    q = (-torch.ones_like(k)).requires_grad_()
    k, v = k.requires_grad_(), v.requires_grad_()
    o = linear_attention(q, k, v, "relu", impl="triton")
    assert (o == 0.0).all()
    for gradient in torch.autograd.grad(o.sum(), (q, k, v)):
        assert (gradient == 0.0).all()


def check_nan_propagates(feature_map: str, device: str) -> None:
    q, k, v, tq, tk, tv, _ = (x.to(device) for x in random_operands(1, 70, 1, 16, dtype=torch.float32))
    k[0, 7] = float("nan")
    o, to = linear_attention_jvp(q, k, v, tq, tk, tv, feature_map, impl="triton")
    assert o.isnan().all()
    assert to.isnan().all()
    q[0, 7] = float("nan")
    k[0, 7] = 0.0
    o = linear_attention(q, k, v, feature_map, impl="triton")
    assert o[0, 7].isnan().all()
    assert o.isnan().sum() == 16
