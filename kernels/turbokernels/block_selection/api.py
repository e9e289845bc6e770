"""Public entry of block selection."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from turbokernels import dispatch
from turbokernels.block_selection import reference
from turbokernels.blocks import BlockMask, check_block_size
from turbokernels.checks import check_attention


def _triton(*operands: Any) -> BlockMask:
    from turbokernels.block_selection import kernel  # here, so that the library imports without Triton

    return kernel.select_blocks(*operands)


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.select_blocks}


def check_selection(op: str, topk: float, block_q: int, block_k: int) -> None:
    """Require a fraction and block sizes that the kernels know."""
    if not 0.0 < topk <= 1.0:  # also refuses NaN
        raise ValueError(f"{op}: topk={topk} is out of range; use a fraction in (0, 1], such as 0.1")
    check_block_size(op, "block_q", block_q)
    check_block_size(op, "block_k", block_k)


def select_blocks(q: Tensor, k: Tensor, topk: float, block_q: int, block_k: int, impl: str = "auto") -> BlockMask:
    """Choose the key blocks that each query block attends to: the best max(1, floor(topk * key blocks)) by pooled
    score.

    q: (B, Lq, N, D), k: (B, Lk, N, D), after norm and RoPE; any strides with a contiguous last dimension; topk in (0,
    1];
    block_q, block_k: 16, 32, 64 or 128 tokens. The choice has no gradient. Ties go to the lower block index.
    Errors: ValueError for topk, block sizes or operands out of range.
    Source: SLA, arXiv 2509.24006; method.md section 3, steps 1-3.
    """
    check_selection("select_blocks", topk, block_q, block_k)
    check_attention("select_blocks", q, k)
    return dispatch.choose("select_blocks", impl, q.device, IMPLEMENTATIONS)(q, k, topk, block_q, block_k)
