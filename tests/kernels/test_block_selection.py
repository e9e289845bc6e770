"""Block selection against a loop over the definition (method.md section 3, steps 1-3)."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_oracles import strided
from torch import Tensor
from turbokernels import BlockMask, select_blocks


def naive_kept(q_BLND: Tensor, k_BLND: Tensor, topk: float, block_q: int, block_k: int) -> list[list[list[list[int]]]]:
    """The kept blocks by the definition, in float64, one block at a time."""
    q_BLND, k_BLND = q_BLND.double(), k_BLND.double()
    kept_all = []
    for b in range(q_BLND.shape[0]):
        kept_all.append([])
        for n in range(q_BLND.shape[2]):
            q_LD, k_LD = q_BLND[b, :, n], k_BLND[b, :, n]
            smooth_LD = k_LD - k_LD.mean(0)
            keys = [smooth_LD[start : start + block_k].mean(0) for start in range(0, len(k_LD), block_k)]
            rows = []
            for start in range(0, len(q_LD), block_q):
                query_D = q_LD[start : start + block_q].mean(0)
                scores = [float(query_D @ key_D) for key_D in keys]
                best = sorted(range(len(keys)), key=lambda j, scores=scores: -scores[j])
                rows.append(sorted(best[: max(1, math.floor(topk * len(keys)))]))
            kept_all[-1].append(rows)
    return kept_all


@pytest.mark.parametrize(
    ("length_q", "length_k", "block_q", "block_k", "topk"),
    [
        (1, 1, 16, 16, 0.1),
        (63, 63, 16, 16, 0.5),
        (257, 257, 64, 32, 0.3),
        (257, 130, 32, 64, 1.0),
        (300, 515, 128, 128, 0.4),
    ],
)
def test_matches_the_definition(length_q: int, length_k: int, block_q: int, block_k: int, topk: float) -> None:
    q, k = torch.randn(2, length_q, 3, 8), torch.randn(2, length_k, 3, 8) + 5.0
    mask = select_blocks(q, k, topk, block_q, block_k)
    assert mask.kept.dtype == torch.int32
    assert mask.kept.tolist() == naive_kept(q, k, topk, block_q, block_k)
    assert (mask.length_q, mask.length_k, mask.block_q, mask.block_k) == (length_q, length_k, block_q, block_k)
    assert select_blocks(strided(q), strided(k), topk, block_q, block_k).kept.equal(mask.kept)


def test_a_ragged_block_is_averaged_over_its_real_tokens() -> None:
    """One token in the last block: averaged over 16 it would score 1/16 of its value and lose to the others."""
    k = torch.zeros(1, 33, 1, 4)
    k[:, :32, :, 0] = 1.0
    k[:, 32, :, 0] = 3.0
    q = torch.zeros(1, 16, 1, 4)
    q[..., 0] = 1.0
    assert select_blocks(q, k, 0.34, 16, 16).kept.flatten().tolist() == [2]


def test_a_large_common_key_offset_changes_nothing() -> None:
    """Smooth-k: the offset shifts every score of a row alike."""
    q, k = torch.randn(1, 128, 2, 16), torch.randn(1, 128, 2, 16)
    offset = 1000.0 * torch.randn(1, 1, 2, 16).round()
    assert select_blocks(q, k + offset, 0.25, 16, 16).kept.tolist() == naive_kept(q, k + offset, 0.25, 16, 16)


def test_ties_keep_the_lowest_indices() -> None:
    q = k = torch.ones(1, 128, 1, 8)
    assert select_blocks(q, k, 0.5, 32, 16).kept.tolist() == [[[[0, 1, 2, 3]] * 4]]


@pytest.mark.parametrize("topk", [0.3, 1.0])
def test_transposed_lists_hold_the_same_pairs(topk: float) -> None:
    mask = select_blocks(torch.randn(2, 200, 3, 8), torch.randn(2, 150, 3, 8), topk, 16, 32)
    for b in range(2):
        for n in range(3):
            for j in range(mask.n_k_blocks):
                expected = [i for i in range(mask.n_q_blocks) if j in mask.kept[b, n, i].tolist()]
                start, stop = mask.offsets[b, n, j : j + 2].tolist()
                assert mask.q_blocks[b, n, start:stop].tolist() == expected
                assert mask.counts[b, n, j] == len(expected)
    assert mask.q_blocks.dtype == mask.counts.dtype == mask.offsets.dtype == torch.int32
    assert mask.offsets[..., -1].unique().tolist() == [mask.n_q_blocks * mask.n_kept]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_dtype_selects_from_exact_means(dtype: torch.dtype) -> None:
    """Pooling must not happen in 16 bits: the choice is that of the same values in float64."""
    q, k = torch.randn(1, 257, 2, 32).to(dtype), torch.randn(1, 257, 2, 32).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert select_blocks(q, k, 0.3, 32, 32).kept.tolist() == naive_kept(q, k, 0.3, 32, 32)


def test_a_nan_key_is_kept_by_every_query_block() -> None:
    k = torch.randn(1, 128, 1, 8)
    k[0, 70, 0, 3] = float("nan")
    assert (select_blocks(torch.randn(1, 128, 1, 8), k, 0.13, 16, 16).kept == 70 // 16).all()


def test_the_choice_has_no_gradient() -> None:
    q = torch.randn(1, 64, 1, 8, requires_grad=True)
    assert not select_blocks(q, q, 0.5, 16, 16).kept.requires_grad


@pytest.mark.parametrize("topk", [0.0, -0.1, 1.0001, 1.5, float("nan"), float("inf")])
def test_topk_out_of_range(topk: float) -> None:
    q = torch.randn(1, 64, 1, 8)
    with pytest.raises(ValueError, match=rf"topk={topk} .*\(0, 1\]"):
        select_blocks(q, q, topk, 16, 16)


@pytest.mark.parametrize("block", [0, 8, 48, 256])
def test_block_size_that_no_kernel_knows(block: int) -> None:
    q = torch.randn(1, 64, 1, 8)
    with pytest.raises(ValueError, match=f"block_k={block} .* 16, 32, 64, 128"):
        select_blocks(q, q, 0.5, 16, block)


@pytest.mark.parametrize(
    ("kept", "lengths", "message"),
    [
        (torch.zeros(1, 1, 2, 1), (32, 32), "int32"),
        (torch.zeros(1, 1, 3, 1, dtype=torch.int32), (32, 32), r"expected \(batch, heads, 2, m\)"),
        (torch.zeros(1, 1, 2, 3, dtype=torch.int32), (32, 32), "expected 1 to 2"),
        (torch.zeros(1, 1, 0, 1, dtype=torch.int32), (0, 32), "length_q=0"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(kept: Tensor, lengths: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMask(kept, 16, 16, *lengths)
