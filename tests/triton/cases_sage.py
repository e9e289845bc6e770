"""What the quantised attention kernels must do, on any device: checked under the interpreter and on GPUs."""

from __future__ import annotations

import torch
from cases_linear import strided_on
from kernel_oracles import masked_attention, random_operands, token_mask
from torch import Tensor
from turbokernels import BlockMask, add_linear_attention, sage_attention, sage_sla, sage_sparse_attention, select_blocks

# One step of the 8- or 16-bit format of P V, relative.
STEPS = {"fp8": 2**-4, "fp16": 2**-11}


def random_mask(batch: int, heads: int, length_q: int, length_k: int, block_q: int, block_k: int) -> BlockMask:
    """Random lists that keep about half of the key blocks, and every query block the ragged last one half the time."""
    n_q, n_k = -(-length_q // block_q), -(-length_k // block_k)
    scores = torch.rand(batch, heads, n_q, n_k)
    kept = scores.topk(max(1, n_k // 2)).indices.sort(-1).values.int()
    return BlockMask(kept, block_q, block_k, length_q, length_k)


def on(mask: BlockMask, device: str) -> BlockMask:
    return BlockMask(mask.kept.to(device), mask.block_q, mask.block_k, mask.length_q, mask.length_k)


def operands(length_q: int, length_k: int, dim: int, dtype: torch.dtype, device: str, batch: int = 2) -> list[Tensor]:
    q, k, v, *_ = random_operands(batch, length_q, 2, dim, length_k)
    k[..., 1] += 5.0  # what smoothing removes
    v[..., 0] *= 8.0  # what a scale per channel is for
    return [x.to(device, dtype) for x in (q, k, v)]


def assert_like(got: Tensor, expected: Tensor, v: Tensor, pv: str) -> None:
    """Online, probabilities are rounded relative to the largest score so far and not to the row's largest: every product
    may differ by a rounding, in either direction, so that sums differ by far less than a step."""
    assert got.dtype == expected.dtype
    largest = v.double().abs().amax((0, 1))  # (N, D)
    difference = (got.double() - expected.double()).abs() / largest
    rounding = torch.finfo(got.dtype).eps
    assert difference.max() < 0.5 * STEPS[pv] + 2e-3 + rounding
    assert difference.mean() < 0.02 * STEPS[pv] + rounding / 4


def check_sparse(
    pv: str, length_q: int, length_k: int, block_q: int, block_k: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    """The kernels against the reference's rounding, on packed operands and on views."""
    q, k, v = operands(length_q, length_k, dim, dtype, device)
    mask = on(random_mask(2, 2, length_q, length_k, block_q, block_k), device)
    expected = sage_sparse_attention(q, k, v, mask, pv, impl="reference")
    got = sage_sparse_attention(q, k, v, mask, pv, impl="triton")
    assert_like(got, expected, v, pv)
    assert sage_sparse_attention(*(strided_on(x) for x in (q, k, v)), mask, pv, impl="triton").equal(got)


def check_dense(pv: str, length_q: int, length_k: int, dim: int, dtype: torch.dtype, device: str) -> None:
    q, k, v = operands(length_q, length_k, dim, dtype, device)
    expected = sage_attention(q, k, v, pv, impl="reference")
    assert_like(sage_attention(q, k, v, pv, impl="triton"), expected, v, pv)


def check_one_call(
    pv: str,
    length_q: int,
    length_k: int,
    block_q: int,
    block_k: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
    feature_map: str = "softmax",
) -> None:
    """SageSLA as one call: the same lists as selection's, and its parts' sum. The mean of k is summed in another order, so
    that an 8-bit value may be its neighbour."""
    q, k, v = operands(length_q, length_k, dim, dtype, device)
    weight, bias = torch.randn(dim, dim) / dim**0.5, torch.randn(dim)
    projection = weight.to(device), bias.to(device)

    def together(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, BlockMask]:
        return sage_sla(q, k, v, *projection, 0.4, block_q, block_k, feature_map, pv, impl="triton")

    got, mask = together(q, k, v)
    assert mask.kept.equal(select_blocks(q, k, 0.4, block_q, block_k, impl="triton").kept)
    sparse = sage_sparse_attention(q, k, v, mask, pv, impl="reference")
    expected = add_linear_attention(sparse, q, k, v, *projection, feature_map, impl="reference")
    # The branches may cancel; of P, rows are about of length 1. Views are summed in another order.
    largest = v.abs() + expected.abs().max()
    assert_like(got, expected, largest, pv)
    assert_like(together(*(strided_on(x) for x in (q, k, v)))[0], got, largest, pv)


def check_accuracy(pv: str, length: int, dim: int, dtype: torch.dtype, device: str) -> None:
    """What eight bits cost against exact attention over the same blocks, on normal operands."""
    q, k, v, *_ = (x.to(device, dtype) for x in random_operands(1, length, 2, dim))
    mask = select_blocks(q, k, 0.5, 64, 64, impl="reference")
    seen = token_mask(on(mask, "cpu")).to(device)
    exact = masked_attention(q.double(), k.double(), v.double(), seen)
    got = sage_sparse_attention(q, k, v, mask, pv, impl="triton").double()
    assert (got - exact).norm() / exact.norm() <= 0.041
    assert torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), 0) >= 0.999


def check_smoothing(device: str) -> None:
    """Unsmoothed, a common offset would take the whole int8 range and leave the differences between keys nothing."""
    q, k, v, *_ = (x.to(device, torch.float32) for x in random_operands(1, 130, 1, 32))
    offset = 100.0 * torch.randn(1, 1, 1, 32, device=device)
    exact = masked_attention(q.double(), k.double(), v.double())
    plain = (sage_attention(q, k, v, "fp16", impl="triton").double() - exact).norm()
    shifted = (sage_attention(q, k + offset, v, "fp16", impl="triton").double() - exact).norm()
    assert shifted < 1.1 * plain


def check_zeros(pv: str, device: str) -> None:
    zeros = torch.zeros(1, 40, 1, 32, device=device)
    assert sage_attention(zeros, zeros, zeros, pv, impl="triton").equal(zeros)


def check_nan_propagates(pv: str, device: str) -> None:
    """A key's NaN reaches its channel's mean, so every row; a query's its block's scale; a value's its channel."""
    q, k, v, *_ = (x.to(device, torch.float32) for x in random_operands(1, 140, 1, 32))
    nan = float("nan")

    def run(**bad: Tensor) -> Tensor:
        names = {"q": q, "k": k, "v": v, **bad}
        return sage_attention(names["q"], names["k"], names["v"], pv, impl="triton")

    bad_q, bad_k, bad_v = q.clone(), k.clone(), v.clone()
    bad_q[0, 130, 0, 3] = bad_k[0, 7, 0, 0] = bad_v[0, 9, 0, 5] = nan
    assert run(k=bad_k).isnan().all()
    assert run(q=bad_q)[0, 128:].isnan().all()
    assert run(q=bad_q)[0, :128].isfinite().all()
    assert run(v=bad_v)[..., 5].isnan().all()
    assert run(v=bad_v)[..., :5].isfinite().all()
