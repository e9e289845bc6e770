"""Block selection kernels against the reference, which is held to the definition; run by tests/triton and tests/gpu."""

from __future__ import annotations

import torch
from kernel_oracles import strided
from turbokernels import BlockMask, select_blocks
from turbokernels.block_selection.kernel import keep_best, transpose_lists

# length_q, length_k, block_q, block_k, topk: ragged blocks
CASES = [
    (1, 1, 16, 16, 0.1),
    (20, 63, 16, 16, 0.5),
    (70, 130, 32, 64, 1.0),
    (130, 515, 128, 128, 0.4),
]
ROW_LENGTHS = [1, 511, 512, 513, 2048, 4100]  # one warp's, four warps', and more than four warps hold


def check_selection(case: tuple[int, int, int, int, float], dtype: torch.dtype, device: str) -> None:
    """The same blocks as the reference in float64, but for blocks whose scores float32 cannot tell apart."""
    length_q, length_k, block_q, block_k, topk = case
    layout = topk, block_q, block_k
    heads = 2 if length_k < 5000 else 1
    q, k = torch.randn(2, length_q, heads, 32).to(dtype), (torch.randn(2, length_k, heads, 32) + 5.0).to(dtype)
    expected = select_blocks(q.double(), k.double(), *layout, impl="reference")
    mask = select_blocks(q.to(device), k.to(device), *layout, impl="triton")
    assert mask.kept.dtype == torch.int32
    assert mask.kept.shape == expected.kept.shape
    assert (mask.kept.diff(dim=-1) > 0).all()
    same = (mask.kept.cpu() == expected.kept).all(-1)
    assert same.all() if length_k < 5000 else same.double().mean() > 0.99


def check_row_lengths(n_blocks: int, device: str) -> None:
    """Rows of any length against sorting, with many ties: of equals the lower index is kept."""
    score = torch.randn(1, 2, 3, n_blocks).mul(20).round()
    n_kept = max(1, n_blocks // 3)
    expected = score.sort(dim=-1, descending=True, stable=True).indices[..., :n_kept].sort(-1).values
    assert torch.equal(keep_best(score.to(device), n_kept).cpu(), expected.int())


def check_strides(device: str) -> None:
    q, k = torch.randn(2, 40, 2, 32, device=device), torch.randn(2, 100, 2, 32, device=device)
    fused = torch.stack((q, q), 2)[:, :, 1]
    views = strided(q), strided(k)
    expected = select_blocks(q, k, 0.5, 32, 16, impl="triton").kept
    for operands in (views, (fused, k)):
        assert torch.equal(select_blocks(*operands, 0.5, 32, 16, impl="triton").kept, expected)


def check_transposed(case: tuple[int, int, int, int, float], device: str) -> None:
    """The lists that sorting gives on a CPU."""
    length_q, length_k, block_q, block_k, topk = case
    n_q, n_k = -(-length_q // block_q), -(-length_k // block_k)
    kept = (
        torch.rand(2, 2 if length_k < 5000 else 1, n_q, n_k)
        .topk(max(1, int(topk * n_k)), -1)
        .indices.sort(-1)
        .values.int()
    )
    mask = BlockMask(kept, block_q, block_k, length_q, length_k)
    for got, expected in zip(transpose_lists(kept.to(device), n_k), (mask.counts, mask.offsets, mask.q_blocks)):
        assert got.dtype == torch.int32
        assert torch.equal(got.cpu(), expected)


def check_edges(device: str) -> None:
    """Ties keep the lowest indices, zeros of both signs tie, and what is not finite sorts as torch sorts it."""
    ones = torch.ones(1, 128, 1, 16, device=device)
    assert select_blocks(ones, ones, 0.5, 32, 16, impl="triton").kept.tolist() == [[[[0, 1, 2, 3]] * 4]]
    assert select_blocks(ones, -ones, 0.5, 32, 16, impl="triton").kept.tolist() == [[[[0, 1, 2, 3]] * 4]]
    q, k = torch.randn(2, 1, 64, 1, 16, device=device)
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = k.clone()
        bad[0, 40, 0, 3] = value
        got, expected = (select_blocks(q, bad, 0.3, 32, 16, impl=impl) for impl in ("triton", "reference"))
        assert torch.equal(got.kept, expected.kept)
    assert not select_blocks(q.requires_grad_(), k, 0.5, 16, 16, impl="triton").kept.requires_grad


def check_offset(device: str) -> None:
    """Smooth-k: an offset that all keys share changes no choice, however large."""
    q, k = torch.randn(1, 32, 2, 16), torch.randn(1, 128, 2, 16)
    k = k + 1000.0 * torch.randn(1, 1, 2, 16).round()
    expected = select_blocks(q.double(), k.double(), 0.25, 16, 16, impl="reference")
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(
            select_blocks(q.to(device), k.to(device), 0.25, 16, 16, impl="triton").kept.cpu(), expected.kept
        )
