"""Linear attention against the explicit sum over keys (method.md section 3, step 5)."""

from __future__ import annotations

import pytest
import torch
from kernel_oracles import random_operands, strided
from torch import Tensor
from turbokernels import linear_attention, linear_attention_jvp
from turbokernels.testing import assert_within_budget

FEATURE_MAPS = ("softmax", "elu", "relu")


def explicit(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, feature_map: str) -> Tensor:
    """Every query-key weight phi(q_i) . phi(k_j) written out; no associativity used."""

    def phi(x: Tensor) -> Tensor:
        if feature_map == "softmax":
            return x.exp() / x.exp().sum(-1, keepdim=True)
        return torch.where(x > 0, x + 1, x.exp()) if feature_map == "elu" else x.clamp(min=0)

    weight_BNQK = torch.einsum("bqnd,bknd->bnqk", phi(q_BLND), phi(k_BLND))
    total_BQN1 = weight_BNQK.sum(-1).transpose(1, 2).unsqueeze(-1)
    return torch.einsum("bnqk,bknd->bqnd", weight_BNQK, v_BLND) / (total_BQN1 + 1e-5)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("length_q", "length_k"), [(1, 1), (63, 63), (257, 100)])
def test_value_gradient_and_tangent_in_float64(feature_map: str, length_q: int, length_k: int) -> None:
    q, k, v, tq, tk, tv, do = random_operands(2, length_q, 3, 8, length_k)
    exact_o, exact_to = torch.func.jvp(lambda *x: explicit(*x, feature_map), (q, k, v), (tq, tk, tv))
    primals = tuple(x.clone().requires_grad_() for x in (q, k, v))
    exact_grads = torch.autograd.grad(explicit(*primals, feature_map), primals, do)
    o, to = linear_attention_jvp(*primals, tq, tk, tv, feature_map)
    assert not to.requires_grad
    assert o.equal(linear_attention(*primals, feature_map))
    torch.testing.assert_close(o, exact_o, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(to, exact_to, rtol=1e-11, atol=1e-11)
    for got, exact in zip(torch.autograd.grad(o, primals, do), exact_grads):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_error_budget(dtype: torch.dtype, feature_map: str) -> None:
    q, k, v, tq, tk, tv, _ = random_operands(2, 129, 2, 32, dtype=dtype)

    def run(cast: torch.dtype) -> tuple[Tensor, Tensor]:
        primals, tangents = tuple(x.to(cast) for x in (q, k, v)), tuple(x.to(cast) for x in (tq, tk, tv))
        return torch.func.jvp(lambda *x: explicit(*x, feature_map), primals, tangents)

    actual = linear_attention_jvp(q, k, v, tq, tk, tv, feature_map)
    for name, got, plain, exact in zip(("o", "to"), actual, run(dtype), run(torch.float64)):
        assert got.dtype == dtype
        assert_within_budget(got, plain, exact, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    operands = random_operands(1, 33, 2, 16, dtype=dtype)[:6]
    for got, wide in zip(linear_attention_jvp(*operands), linear_attention_jvp(*(x.float() for x in operands))):
        assert got.equal(wide.to(dtype))


def test_strided_views_and_autocast_give_the_same_bits() -> None:
    operands = random_operands(2, 63, 2, 16, dtype=torch.float32)[:6]
    expected = linear_attention_jvp(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_attention_jvp(*(strided(x) for x in operands))
    assert got[0].equal(expected[0])
    assert got[1].equal(expected[1])


def test_a_query_without_features_gives_zero_and_not_nan() -> None:
    """relu can leave phi(q) = 0: the 1e-5 in the denominator keeps 0 / 0 away."""
    _, k, v, *_ = random_operands(1, 16, 1, 8)
    assert (linear_attention(-torch.ones_like(k), k, v, "relu") == 0.0).all()


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_nan_propagates(feature_map: str) -> None:
    q, k, v, tq, tk, tv, _ = random_operands(1, 33, 1, 8)
    k[0, 7] = float("nan")
    o, to = linear_attention_jvp(q, k, v, tq, tk, tv, feature_map)
    assert o.isnan().all()
    assert to.isnan().all()


def test_unknown_feature_map() -> None:
    q, k, v, *_ = random_operands(1, 16, 1, 8)
    with pytest.raises(ValueError, match=r"feature_map='cosine' .* softmax, elu, relu"):
        linear_attention(q, k, v, "cosine")
