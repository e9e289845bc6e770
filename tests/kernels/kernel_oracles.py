"""Brute-force attention, written from the definition and sharing no code with the package.

Shape suffixes: B batch, L tokens, N heads, D head dim, Q query tokens, K key tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from turbokernels import BlockMask


def random_operands(
    batch: int, length_q: int, heads: int, dim: int, length_k: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """q, k, v, tq, tk, tv, do: standard normal."""
    shape_q, shape_k = (batch, length_q, heads, dim), (batch, length_k or length_q, heads, dim)
    shapes = (shape_q, shape_k, shape_k, shape_q, shape_k, shape_k, shape_q)
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def token_mask(mask: BlockMask) -> Tensor:
    """bool (B, N, Lq, Lk): which key token each query token sees, by the definition, one entry at a time."""
    batch, heads, n_q_blocks, n_kept = mask.kept.shape
    seen_BNQK = torch.zeros(batch, heads, mask.length_q, mask.length_k, dtype=torch.bool)
    for b in range(batch):
        for n in range(heads):
            for i in range(n_q_blocks):
                for m in range(n_kept):
                    j = int(mask.kept[b, n, i, m])
                    rows = slice(i * mask.block_q, (i + 1) * mask.block_q)
                    seen_BNQK[b, n, rows, j * mask.block_k : (j + 1) * mask.block_k] = True
    return seen_BNQK


def masked_attention(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, seen_BNQK: Tensor | None = None) -> Tensor:
    """Plain softmax attention in the operands' dtype, over all keys or those that are seen."""
    s_BNQK = torch.einsum("bqnd,bknd->bnqk", q_BLND, k_BLND) / math.sqrt(q_BLND.shape[-1])
    if seen_BNQK is not None:
        s_BNQK = s_BNQK.masked_fill(~seen_BNQK, float("-inf"))
    return torch.einsum("bnqk,bknd->bqnd", s_BNQK.softmax(-1), v_BLND)


def strided(x_BLND: Tensor) -> Tensor:
    """The same values as a view into something larger: no dimension but the last is packed."""
    batch, length, heads, dim = x_BLND.shape
    store = torch.full((length, batch, 2 * heads, dim + 3), float("nan"), dtype=x_BLND.dtype, device=x_BLND.device)
    view = store.permute(1, 0, 2, 3)[:, :, ::2, 1 : dim + 1]
    view.copy_(x_BLND)
    return view
