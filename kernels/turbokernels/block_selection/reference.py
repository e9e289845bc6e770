"""Specification of block selection in plain PyTorch (SLA, arXiv 2509.24006; method.md section 3, steps 1-3).

Shape suffixes: B batch, L tokens, N heads, D head dim, I query blocks, J key blocks, M kept key blocks per query block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from turbokernels.blocks import BlockMask


def block_means(x_BLND: Tensor, block: int) -> Tensor:
    """Mean of every block of tokens, a ragged last one over its real tokens; (B, N, blocks, D), float32 or wider."""
    length = x_BLND.shape[1]
    n_full = length // block
    x_BLND = x_BLND.to(torch.promote_types(x_BLND.dtype, torch.float32))
    means = [x_BLND[:, : n_full * block].unflatten(1, (n_full, block)).mean(2)] if n_full else []
    if length % block:
        means.append(x_BLND[:, n_full * block :].mean(1, keepdim=True))
    return torch.cat(means, 1).transpose(1, 2)


def kept_blocks(topk: float, length_k: int, block_k: int) -> int:
    """How many of the key blocks each query block keeps: max(1, floor(topk * J))."""
    return max(1, math.floor(topk * -(-length_k // block_k)))


@torch.no_grad()
def select_blocks(q_BLND: Tensor, k_BLND: Tensor, topk: float, block_q: int, block_k: int) -> BlockMask:
    """Keep, for each query block, the m = max(1, floor(topk * J)) key blocks whose pooled keys score best.

    Ties go to the lower index, so that every device keeps the same blocks. A non-finite pooled key scores NaN, which
    sorts
    first: the block is kept by every query block and the NaN shows in the output instead of vanishing.
    """
    length_k = k_BLND.shape[1]
    pooled_q_BNID = block_means(q_BLND, block_q)
    pooled_k_BNJD = block_means(k_BLND, block_k)
    n_k_blocks = pooled_k_BNJD.shape[2]

    # Smooth-k: the mean over all tokens, which is the mean of the block means weighted by the blocks' real tokens. It
    # moves all scores of a row alike, so it changes no choice; it keeps a large common offset from eating the scores'
    # precision.
    sizes_J1 = pooled_k_BNJD.new_full((n_k_blocks, 1), block_k)
    sizes_J1[-1] = length_k - (n_k_blocks - 1) * block_k
    finite_BNJD = torch.where(pooled_k_BNJD.isfinite(), pooled_k_BNJD, 0.0)
    mean_BN1D = (finite_BNJD * (sizes_J1 / length_k)).sum(2, keepdim=True)

    # No autocast: rounded scores would tie and flip between neighbours.
    with torch.autocast(q_BLND.device.type, enabled=False):
        score_BNIJ = pooled_q_BNID @ (pooled_k_BNJD - mean_BN1D).mT

    n_kept = kept_blocks(topk, length_k, block_k)
    best_BNIM = score_BNIJ.sort(dim=-1, descending=True, stable=True).indices[..., :n_kept]
    kept_BNIM = best_BNIM.sort(dim=-1).values.int()
    return BlockMask(kept_BNIM, block_q, block_k, q_BLND.shape[1], length_k)
