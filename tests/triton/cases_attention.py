"""Attention kernels, with gradient and tangent, against a brute-force softmax; run by tests/triton and tests/gpu."""

from __future__ import annotations

import torch
from kernel_oracles import masked_attention, random_operands, strided, token_mask
from torch import Tensor
from turbokernels import BlockMask, attention_jvp, select_blocks, sparse_attention, sparse_attention_jvp
from turbokernels.testing import assert_within_budget

NAMES = ("o", "to", "dq", "dk", "dv", "o with its tangent")

# length_q, length_k, block_q, block_k, topk, head dim: ragged blocks, single tokens, every block size and head dim
SPARSE_CASES = [
    (1, 40, 16, 16, 0.1, 16),
    (63, 100, 32, 16, 0.6, 32),
    (257, 63, 128, 64, 1.0, 64),
    (100, 257, 64, 128, 0.5, 128),
    (130, 200, 16, 32, 0.4, 32),
]
DENSE_CASES = [(1, 40, 16), (63, 100, 32), (130, 65, 128), (257, 33, 64)]


def random_mask(
    batch: int, heads: int, length_q: int, length_k: int, block_q: int, block_k: int, topk: float
) -> BlockMask:
    """Any blocks, not only those that a score would choose: some key blocks are kept by no query block."""
    n_q, n_k = -(-length_q // block_q), -(-length_k // block_k)
    kept = torch.rand(batch, heads, n_q, n_k).topk(max(1, int(topk * n_k)), -1).indices.sort(-1).values.int()
    return BlockMask(kept, block_q, block_k, length_q, length_k)


def on(mask: BlockMask, device: str) -> BlockMask:
    return BlockMask(mask.kept.to(device), mask.block_q, mask.block_k, mask.length_q, mask.length_k)


def with_outliers(operands: tuple[Tensor, ...], size: float) -> tuple[Tensor, ...]:
    """Larger values throughout, and a channel of q, k and v that is larger still and shared by all tokens."""
    q, k, v, *rest = (x * size for x in operands)
    for x in (q, k, v):
        x[..., 3] += 4 * size
    return q, k, v, *(x / size for x in rest)


def plain(operands: tuple[Tensor, ...], dtype: torch.dtype, seen: Tensor | None) -> tuple[Tensor, ...]:
    """What `NAMES` says by plain PyTorch, all in `dtype`."""
    q, k, v, tq, tk, tv, do = (x.to(dtype) for x in operands)
    primals = tuple(x.clone().requires_grad_() for x in (q, k, v))
    o = masked_attention(*primals, seen)
    _, to = torch.func.jvp(lambda *x: masked_attention(*x, seen), (q, k, v), (tq, tk, tv))
    return o, to, *torch.autograd.grad(o, primals, do), o


def compute(operands: tuple[Tensor, ...], mask: BlockMask | None) -> tuple[Tensor, ...]:
    """What `NAMES` says by the kernels: `sparse_attention`'s if there is a mask, else `attention_jvp`'s (o once)."""
    q, k, v, tq, tk, tv, do = operands
    primals = tuple(x.detach().requires_grad_() for x in (q, k, v))
    if mask is None:
        o, to = attention_jvp(*primals, tq, tk, tv, impl="triton")
        return o, to, *torch.autograd.grad(o, primals, do)
    o = sparse_attention(*primals, mask, impl="triton")
    grads = torch.autograd.grad(o, primals, do)
    o_jvp, to = sparse_attention_jvp(*primals, tq, tk, tv, mask, impl="triton")
    assert not to.requires_grad
    if o.itemsize == 2:  # of the same float32 sum, in another order: a rounding apart
        torch.testing.assert_close(o_jvp, o, rtol=2 * torch.finfo(o.dtype).eps, atol=2 * torch.finfo(o.dtype).eps)
    return o, to, *grads, o_jvp


def assert_all_within_budget(got: tuple[Tensor, ...], operands: tuple[Tensor, ...], seen: Tensor | None) -> None:
    dtype = operands[0].dtype
    for name, mine, rough, exact in zip(NAMES, got, plain(operands, dtype, seen), plain(operands, torch.float64, seen)):
        assert mine.dtype == dtype
        assert_within_budget(mine, rough, exact, name)


def samples(length: int, device: str) -> int:
    """How many samples a case takes: of the few numbers of one query the largest error is luck, plain PyTorch's as well. Over
    512 samples it is steady. The interpreter, which computes as plain PyTorch does, does without more."""
    return 512 if length == 1 and device == "cuda" else 2


def check_sparse(case: tuple, dtype: torch.dtype, device: str, size: float = 1.0) -> None:
    *shape, dim = case
    batch = samples(shape[0], device)
    operands = random_operands(batch, shape[0], 2, dim, shape[1], dtype=dtype)
    operands = tuple(x.to(device) for x in (operands if size == 1.0 else with_outliers(operands, size)))
    mask = random_mask(batch, 2, *shape)
    seen = token_mask(mask).to(device)
    assert_all_within_budget(compute(operands, on(mask, device)), operands, seen)


def check_dense(case: tuple[int, int, int], dtype: torch.dtype, device: str, size: float = 1.0) -> None:
    length_q, length_k, dim = case
    operands = random_operands(samples(length_q, device), length_q, 2, dim, length_k, dtype=dtype)
    operands = tuple(x.to(device) for x in (operands if size == 1.0 else with_outliers(operands, size)))
    assert_all_within_budget(compute(operands, None), operands, None)


def check_one_key(device: str) -> None:
    """Its probability is 1 whatever q and k are: o = v, to = tv, dv = do, and nothing else but float32 rounding."""
    operands = tuple(x.to(device) for x in random_operands(2, 1, 2, 16, dtype=torch.float16))
    for mask in (None, on(random_mask(2, 2, 1, 1, 16, 16, 0.1), device)):
        o, to, dq, dk, dv, *_ = compute(operands, mask)
        assert torch.equal(o, operands[2])
        assert torch.equal(dv, operands[6])
        torch.testing.assert_close(to, operands[5], rtol=1e-3, atol=1e-3)
        assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def check_absent_tangents(device: str) -> None:
    """A tangent that is None is a zero one, whose products are not computed."""
    q, k, v, *tangents, _ = (x.to(device) for x in random_operands(1, 33, 2, 16, 20, dtype=torch.float16))
    for given in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)):
        nones = [t if g else None for t, g in zip(tangents, given)]
        zeros = [t if g else torch.zeros_like(t) for t, g in zip(tangents, given)]
        got, expected = (attention_jvp(q, k, v, *x, impl="triton") for x in (nones, zeros))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def check_strides(sparse: bool, dtype: torch.dtype, device: str) -> None:
    """Views of odd strides, and views into a fused projection, which tensor descriptors can read."""
    operands = tuple(x.to(device) for x in random_operands(2, 40, 2, 32, dtype=dtype))
    mask = on(random_mask(2, 2, 40, 40, 32, 16, 0.6), device) if sparse else None
    fused = torch.stack(operands, 2)
    expected = compute(operands, mask)
    for views in (tuple(strided(x) for x in operands), fused.unbind(2)):
        for got, same in zip(compute(views, mask), expected):
            torch.testing.assert_close(got, same, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    # The gradient of a sum is a broadcast 1, whose last stride is 0.
    q, k, v = (x.detach().requires_grad_() for x in operands[:3])
    o = (
        sparse_attention(q, k, v, mask, impl="triton")
        if mask
        else attention_jvp(q, k, v, *operands[3:6], impl="triton")[0]
    )
    broadcast, packed = (
        torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
        for do in (torch.ones((), dtype=dtype, device=device).expand_as(o), torch.ones_like(o))
    )
    for got, same in zip(broadcast, packed):
        assert torch.equal(got, same)


def check_only_the_value_has_a_gradient(device: str) -> None:
    leaves = tuple(x.to(device).requires_grad_() for x in random_operands(1, 40, 1, 16, dtype=torch.float32)[:6])
    mask = on(random_mask(1, 1, 40, 40, 16, 16, 0.5), device)
    for o, to in (sparse_attention_jvp(*leaves, mask, impl="triton"), attention_jvp(*leaves, impl="triton")):
        assert not to.requires_grad
        grads = torch.autograd.grad(o.sum() + to.sum(), leaves, allow_unused=True)
        assert [x is None for x in grads] == [False] * 3 + [True] * 3
    with torch.no_grad():
        assert not sparse_attention(*leaves[:3], mask, impl="triton").requires_grad


def check_nan(device: str) -> None:
    """A query's NaN stays in its row; a key's reaches every row that keeps its block, and no other sample."""
    q, k, v, *_ = (x.to(device) for x in random_operands(2, 128, 1, 16, dtype=torch.float16))
    mask = select_blocks(q.float().cpu(), k.float().cpu(), 0.25, 16, 16)
    mask = on(mask, device)
    bad = q.clone()
    bad[0, 5] = float("nan")
    rows = sparse_attention(bad, k, v, mask, impl="triton").isnan().any(-1)
    assert rows.nonzero().tolist() == [[0, 5, 0]]
    for operand in (k, v):
        bad = operand.clone()
        bad[1, 100] = float("nan")
        keys, values = (bad, v) if operand is k else (k, bad)
        rows = sparse_attention(q, keys, values, mask, impl="triton").isnan().any(-1)
        keeps = (mask.kept[1, 0] == 100 // 16).any(-1).repeat_interleave(16)
        assert torch.equal(rows[1, :, 0], keeps)
        assert not rows[0].any()
    o, to = attention_jvp(q, bad, bad, q, None, None, impl="triton")
    assert o[1].isnan().all()
    assert to[1].isnan().all()
    assert o[0].isfinite().all()
