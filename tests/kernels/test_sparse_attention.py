"""Block-sparse attention, its gradient and its tangent against a masked softmax over every pair of tokens."""

from __future__ import annotations

import pytest
import torch
from kernel_oracles import masked_attention, random_operands, strided, token_mask
from torch import Tensor
from turbokernels import BlockMask, attention_jvp, select_blocks, softmax_core, sparse_attention, sparse_attention_jvp
from turbokernels.testing import assert_within_budget

CASES = [
    # length_q, length_k, block_q, block_k, topk
    (1, 1, 16, 16, 0.1),
    (63, 63, 16, 16, 0.37),
    (63, 100, 32, 16, 0.6),
    (257, 257, 64, 32, 0.21),
    (257, 257, 16, 128, 0.5),
    (200, 129, 128, 64, 0.7),
]


def random_mask(
    batch: int, heads: int, length_q: int, length_k: int, block_q: int, block_k: int, topk: float
) -> BlockMask:
    """Any blocks, not only those that a score would choose."""
    n_q, n_k = -(-length_q // block_q), -(-length_k // block_k)
    scores = torch.rand(batch, heads, n_q, n_k)
    kept = scores.topk(max(1, int(topk * n_k)), -1).indices.sort(-1).values.int()
    return BlockMask(kept, block_q, block_k, length_q, length_k)


def grad(o: Tensor, inputs: tuple[Tensor, ...], do: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(o, inputs, do)


@pytest.mark.parametrize("case", CASES)
def test_value_gradient_and_tangent_in_float64(case: tuple[int, int, int, int, float]) -> None:
    length_q, length_k, *_ = case
    q, k, v, tq, tk, tv, do = random_operands(2, length_q, 3, 8, length_k)
    mask = random_mask(2, 3, *case)
    seen = token_mask(mask)
    exact_o, exact_to = torch.func.jvp(lambda *x: masked_attention(*x, seen), (q, k, v), (tq, tk, tv))
    primals = tuple(x.clone().requires_grad_() for x in (q, k, v))
    exact_grads = grad(masked_attention(*primals, seen), primals, do)

    o = sparse_attention(*primals, mask)
    torch.testing.assert_close(o, exact_o, rtol=1e-12, atol=1e-12)
    for got, exact in zip(grad(o, primals, do), exact_grads):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)

    o, to = sparse_attention_jvp(*primals, tq, tk, tv, mask)
    torch.testing.assert_close(o, exact_o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(to, exact_to, rtol=1e-12, atol=1e-12)
    for got, exact in zip(grad(o, primals, do), exact_grads):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_only_the_value_carries_a_gradient() -> None:
    q, k, v, tq, tk, tv, _ = (x.requires_grad_() for x in random_operands(1, 40, 1, 8))
    o, to = sparse_attention_jvp(q, k, v, tq, tk, tv, select_blocks(q, k, 0.5, 16, 16))
    assert o.requires_grad
    assert not to.requires_grad
    (o.sum() + to.sum()).backward()
    assert q.grad is not None
    assert tq.grad is None
    assert tk.grad is None
    assert tv.grad is None


def test_a_second_derivative_is_refused() -> None:
    q, k, v, *_ = (x.requires_grad_() for x in random_operands(1, 40, 1, 8))
    (dq,) = torch.autograd.grad(sparse_attention(q, k, v, select_blocks(q, k, 0.5, 16, 16)).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dq.sum().backward()


@pytest.mark.parametrize("length", [1, 63, 257])
def test_topk_of_one_is_dense(length: int) -> None:
    q, k, v, tq, tk, tv, _ = random_operands(2, length, 2, 16)
    mask = select_blocks(q, k, 1.0, 64, 32)
    torch.testing.assert_close(sparse_attention(q, k, v, mask), masked_attention(q, k, v), rtol=1e-12, atol=1e-12)
    sparse, dense = sparse_attention_jvp(q, k, v, tq, tk, tv, mask), attention_jvp(q, k, v, tq, tk, tv)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_budget(dtype: torch.dtype) -> None:
    q, k, v, tq, tk, tv, do = random_operands(2, 129, 2, 32, dtype=dtype)
    mask = random_mask(2, 2, 129, 129, 32, 16, 0.4)
    seen = token_mask(mask)

    def run(cast: torch.dtype) -> tuple[Tensor, ...]:
        primals = tuple(x.to(cast).requires_grad_() for x in (q, k, v))
        o = masked_attention(*primals, seen)
        tangents = tuple(x.to(cast) for x in (tq, tk, tv))
        _, to = torch.func.jvp(lambda *x: masked_attention(*x, seen), tuple(x.detach() for x in primals), tangents)
        return o, to, *grad(o, primals, do.to(cast))

    primals = tuple(x.clone().requires_grad_() for x in (q, k, v))
    o, to = sparse_attention_jvp(*primals, tq, tk, tv, mask)
    actual = (o, to, *grad(o, primals, do))
    for name, got, plain, exact in zip(("o", "to", "dq", "dk", "dv"), actual, run(dtype), run(torch.float64)):
        assert got.dtype == dtype
        assert_within_budget(got, plain, exact, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    *operands, do = random_operands(1, 63, 2, 16, dtype=dtype)
    mask = random_mask(1, 2, 63, 63, 16, 16, 0.6)

    def run(cast: torch.dtype) -> tuple[Tensor, ...]:
        primals = tuple(x.to(cast).requires_grad_() for x in operands[:3])
        o, to = sparse_attention_jvp(*primals, *(x.to(cast) for x in operands[3:]), mask)
        return o, to, *grad(o, primals, do.to(cast))

    for got, wide in zip(run(dtype), run(torch.float32)):
        assert got.equal(wide.to(dtype))


def test_strided_views_give_the_same_bits() -> None:
    q, k, v, tq, tk, tv, do = random_operands(2, 63, 2, 16, dtype=torch.float32)
    mask = select_blocks(q, k, 0.5, 16, 16)
    packed = tuple(x.clone().requires_grad_() for x in (q, k, v))
    views = tuple(strided(x).requires_grad_() for x in (q, k, v))
    o, to = sparse_attention_jvp(*packed, tq, tk, tv, mask)
    o_view, to_view = sparse_attention_jvp(*views, strided(tq), strided(tk), strided(tv), mask)
    assert o_view.equal(o)
    assert to_view.equal(to)
    for got, expected in zip(grad(o_view, views, strided(do)), grad(o, packed, do)):
        assert got.equal(expected)


def test_small_chunks_agree_with_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, tq, tk, tv, do = random_operands(2, 100, 2, 16)
    mask = random_mask(2, 2, 100, 100, 16, 32, 0.6)

    def run() -> tuple[Tensor, ...]:
        primals = tuple(x.clone().requires_grad_() for x in (q, k, v))
        o, to = sparse_attention_jvp(*primals, tq, tk, tv, mask)
        return o, to, *grad(o, primals, do)

    whole = run()
    monkeypatch.setitem(softmax_core.CHUNK_ELEMENTS, "cpu", 1)  # one query block at a time
    for got, expected in zip(run(), whole):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_autocast_does_not_lower_the_precision() -> None:
    q, k, v, *_, do = random_operands(1, 63, 1, 16, dtype=torch.float32)
    mask = select_blocks(q, k, 0.5, 16, 16)
    expected = sparse_attention(q, k, v, mask)
    primals = tuple(x.clone().requires_grad_() for x in (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        got = sparse_attention(*primals, mask)
        grads = grad(got, primals, do)
    assert got.equal(expected)
    for a, b in zip(grads, grad(sparse_attention(*primals, mask), primals, do)):
        assert a.equal(b)


def test_nan_reaches_the_output_and_stays_in_its_row() -> None:
    q, k, v, *_ = random_operands(1, 128, 1, 8)
    q[0, 5] = float("nan")
    mask = select_blocks(q, k, 0.25, 16, 16)
    bad_rows = sparse_attention(q, k, v, mask).isnan().any(-1).flatten()
    assert bad_rows.nonzero().flatten().tolist() == [5]

    q, k, v, *_ = random_operands(1, 128, 1, 8)
    k[0, 100, 0, 2] = float("nan")
    assert sparse_attention(q, k, v, select_blocks(q, k, 0.25, 16, 16)).isnan().all()


def test_large_scores_do_not_overflow() -> None:
    q, k, v, *_ = random_operands(1, 64, 1, 16, dtype=torch.float16)
    o = sparse_attention(q * 100, k * 100, v, select_blocks(q, k, 0.5, 16, 16))
    assert o.isfinite().all()


def test_the_mask_must_be_for_these_operands() -> None:
    q, k, v, *_ = random_operands(1, 64, 2, 8)
    mask = select_blocks(q, k, 0.5, 16, 16)
    with pytest.raises(ValueError, match=r"\(1, 2, 64, 64\).*\(1, 2, 63, 64\).*select the blocks"):
        sparse_attention(q[:, :63], k, v, mask)
    with pytest.raises(ValueError, match="mask is on cpu but q is on meta"):
        sparse_attention(q.to("meta"), k.to("meta"), v.to("meta"), mask)
