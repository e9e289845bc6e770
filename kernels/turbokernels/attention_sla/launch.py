"""SageSLA in as few passes over q, k and v as its parts allow. Every kernel is one of those parts'.

Shape suffixes: B batch, L tokens, N heads, D head dim, G batch * heads, I query blocks, J key blocks, M kept blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbokernels.attention_linear.launch import apply_op, compute_state, flat, project_state
from turbokernels.attention_sage import launch as sage
from turbokernels.block_selection.kernel import best_blocks, centred_key_means
from turbokernels.block_selection.reference import kept_blocks
from turbokernels.blocks import BlockMask


@torch.library.custom_op(
    "turbokernels::sage_sla",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor? bias, int n_kept, int block_q, int block_k, "
    "str feature_map, str pv) -> (Tensor, Tensor)",
)
def sage_sla_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n_kept: int,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
) -> tuple[Tensor, Tensor]:
    """o (B, Lq, N, D) and the kept blocks (B, N, I, M)."""
    batch, length_q, heads, dim = q.shape
    q_BNID = torch.empty(batch, heads, -(-length_q // block_q), dim, dtype=torch.float32, device=q.device)
    queries = sage.quantize_queries(q, block_q, q_BNID)
    k_BNJD, mean_BND = centred_key_means(k, block_k)
    kept = best_blocks(q_BNID, k_BNJD, n_kept)

    state, largest = compute_state(k, v, None, None, feature_map, with_largest=True)
    assert largest is not None
    v_scale = sage.value_scale(largest)
    keys, values = sage.quantize_keys(k, mean_BND.flatten(0, 1), block_k), sage.quantize_values(v, v_scale, block_k, pv)
    sparse = sage.attend(q, queries, keys, values, v_scale, kept, (block_q, block_k), k.shape[1], pv)
    del queries, keys, values  # so that their memory serves the result: 1.2 GB at Wan 14B's 720p
    with torch.autocast(q.device.type, enabled=False):
        o, _ = apply_op(q, None, project_state(state, weight), sparse, None, flat(bias), feature_map)
    return o, kept


@sage_sla_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n_kept: int,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
) -> tuple[Tensor, Tensor]:
    kept = q.new_empty((q.shape[0], q.shape[2], -(-q.shape[1] // block_q), n_kept), dtype=torch.int32)
    return q.new_empty(q.shape), kept


class _Inference(torch.autograd.Function):
    """Without a derivative: `torch.func.jvp` refuses it, where a bare custom op would silently give a zero tangent."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        o, kept = sage_sla_op(*operands)
        ctx.mark_non_differentiable(kept)
        return o, kept

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("SageSLA has no gradient; train with sparse_attention and add_linear_attention")


def sage_sla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
) -> tuple[Tensor, BlockMask]:
    """As `reference.sage_sla`."""
    sage.check("sage_sla", q, pv)
    n_kept = kept_blocks(topk, k.shape[1], block_k)
    with torch.no_grad():
        o, kept = _Inference.apply(q, k, v, weight, bias, n_kept, block_q, block_k, feature_map, pv)  # pyright: ignore[reportGeneralTypeIssues]
    return o, BlockMask(kept, block_q, block_k, q.shape[1], k.shape[1])
