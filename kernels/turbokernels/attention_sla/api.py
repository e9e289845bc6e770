"""Public entry of SageSLA. Inference only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from turbokernels import dispatch
from turbokernels.attention_linear.api import check_feature_map, check_sum
from turbokernels.attention_sage.api import resolve_pv
from turbokernels.attention_sla import reference
from turbokernels.block_selection.api import check_selection
from turbokernels.blocks import BlockMask
from turbokernels.checks import check_attention


def _triton(*operands: Any) -> tuple[Tensor, BlockMask]:
    from turbokernels.attention_sla import launch  # here, so that the library imports without Triton

    return launch.sage_sla(*operands)


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.sage_sla}


def sage_sla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str = "softmax",
    pv: str = "auto",
    impl: str = "auto",
) -> tuple[Tensor, BlockMask]:
    """add_linear_attention(sage_sparse_attention(q, k, v, mask), q, k, v, weight, bias), and mask = select_blocks(q, k).

    One call reads q, k and v less often than the three do: block means come with q's quantisation, the mean of k with
    its block means, and the scales of v with the state of the linear branch.

    q: (B, Lq, N, D), k, v: (B, Lk, N, D), one floating dtype, any strides with a contiguous last dimension; weight (D, D)
    and bias (D,) or None of P, floating; topk, block_q, block_k as in `select_blocks`; pv as in `sage_attention`;
    feature_map as in `linear_attention`. Returns o (B, Lq, N, D) in q's dtype, and the mask.
    Errors: ValueError when operands do not fit or require a gradient.
    Source: SageSLA (arXiv 2509.24006, 2411.10958); method.md sections 3 and 7.
    """
    check_selection("sage_sla", topk, block_q, block_k)
    check_feature_map("sage_sla", feature_map)
    check_attention("sage_sla", q, k, v)
    check_sum("sage_sla", q, weight, bias)
    pv = resolve_pv("sage_sla", q, k, v, pv)
    run = dispatch.choose("sage_sla", impl, q.device, IMPLEMENTATIONS)
    return run(q, k, v, weight, bias, topk, block_q, block_k, feature_map, pv)
