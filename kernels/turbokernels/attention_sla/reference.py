"""Specification of SageSLA as one call: the composition of its parts' specifications."""

from __future__ import annotations

from torch import Tensor

from turbokernels.attention_linear.reference import add_linear_attention
from turbokernels.attention_sage.reference import sage_sparse_attention
from turbokernels.block_selection.reference import select_blocks
from turbokernels.blocks import BlockMask


def sage_sla(
    q_BLND: Tensor,
    k_BLND: Tensor,
    v_BLND: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
) -> tuple[Tensor, BlockMask]:
    """o (B, L, N, D) and the blocks that its sparse branch kept."""
    mask = select_blocks(q_BLND, k_BLND, topk, block_q, block_k)
    sparse_BLND = sage_sparse_attention(q_BLND, k_BLND, v_BLND, mask, pv)
    return add_linear_attention(sparse_BLND, q_BLND, k_BLND, v_BLND, weight_ED, bias_E, feature_map), mask
