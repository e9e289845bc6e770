"""Dense attention with its tangent against `torch.func.jvp` through a plain softmax."""

from __future__ import annotations

import pytest
import torch
from kernel_oracles import masked_attention, random_operands, strided
from torch import Tensor
from turbokernels import attention_jvp, softmax_core
from turbokernels.testing import assert_within_budget


@pytest.mark.parametrize(("length_q", "length_k"), [(1, 1), (63, 63), (257, 32), (5, 257)])
@pytest.mark.parametrize("chunk_elements", [2**19, 4000])
def test_value_gradient_and_tangent_in_float64(
    length_q: int, length_k: int, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(softmax_core.CHUNK_ELEMENTS, "cpu", chunk_elements)
    q, k, v, tq, tk, tv, do = random_operands(2, length_q, 3, 8, length_k)
    exact_o, exact_to = torch.func.jvp(masked_attention, (q, k, v), (tq, tk, tv))
    primals = tuple(x.clone().requires_grad_() for x in (q, k, v))
    o, to = attention_jvp(*primals, tq, tk, tv)
    torch.testing.assert_close(o, exact_o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(to, exact_to, rtol=1e-12, atol=1e-12)
    assert not to.requires_grad
    exact_grads = torch.autograd.grad(masked_attention(*primals), primals, do)
    for got, exact in zip(torch.autograd.grad(o, primals, do), exact_grads):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
def test_a_tangent_that_is_none_is_zero(given: tuple[int, int, int]) -> None:
    q, k, v, *tangents, _ = random_operands(2, 33, 2, 8, 17)
    zeros = [t if g else torch.zeros_like(t) for t, g in zip(tangents, given)]
    nones = [t if g else None for t, g in zip(tangents, given)]
    expected = attention_jvp(q, k, v, *zeros)
    torch.testing.assert_close(attention_jvp(q, k, v, *nones), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_budget(dtype: torch.dtype) -> None:
    q, k, v, tq, tk, tv, do = random_operands(2, 129, 2, 32, 65, dtype=dtype)

    def run(cast: torch.dtype) -> tuple[Tensor, ...]:
        primals = tuple(x.to(cast).requires_grad_() for x in (q, k, v))
        o = masked_attention(*primals)
        tangents = tuple(x.to(cast) for x in (tq, tk, tv))
        _, to = torch.func.jvp(masked_attention, tuple(x.detach() for x in primals), tangents)
        return o, to, *torch.autograd.grad(o, primals, do.to(cast))

    primals = tuple(x.clone().requires_grad_() for x in (q, k, v))
    o, to = attention_jvp(*primals, tq, tk, tv)
    actual = (o, to, *torch.autograd.grad(o, primals, do))
    for name, got, plain, exact in zip(("o", "to", "dq", "dk", "dv"), actual, run(dtype), run(torch.float64)):
        assert got.dtype == dtype
        assert_within_budget(got, plain, exact, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    *operands, do = random_operands(1, 33, 2, 16, 20, dtype=dtype)

    def run(cast: torch.dtype) -> tuple[Tensor, ...]:
        primals = tuple(x.to(cast).requires_grad_() for x in operands[:3])
        o, to = attention_jvp(*primals, *(x.to(cast) for x in operands[3:]))
        return o, to, *torch.autograd.grad(o, primals, do.to(cast))

    for got, wide in zip(run(dtype), run(torch.float32)):
        assert got.equal(wide.to(dtype))


def test_strided_views_give_the_same_bits() -> None:
    operands = random_operands(2, 63, 2, 16, dtype=torch.float32)[:6]
    for got, expected in zip(attention_jvp(*(strided(x) for x in operands)), attention_jvp(*operands)):
        assert got.equal(expected)


def test_autocast_does_not_lower_the_precision() -> None:
    operands = random_operands(1, 33, 1, 16, dtype=torch.float32)[:6]
    expected = attention_jvp(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_jvp(*operands)
    assert got[0].equal(expected[0])
    assert got[1].equal(expected[1])


def test_nan_propagates() -> None:
    q, k, v, tq, tk, tv, _ = random_operands(1, 33, 1, 8)
    k[0, 7, 0, 0] = float("nan")
    o, to = attention_jvp(q, k, v, tq, tk, tv)
    assert o.isnan().all()
    assert to.isnan().all()
