"""Self-attention operators, swapped per model: dense, and SLA (method.md section 3; SLA: arXiv 2509.24006).

Operands are Duals of (B, L, N, D): B batch, L tokens, N heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import turbokernels as tk
from torch import Tensor, nn
from turbokernels import BlockMask

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.tangent import Dual, WideLinear, tangents_left_out


def dense_attention(q: Dual, k: Dual, v: Dual) -> Dual:
    """softmax(q k^T / sqrt(D)) v, Lq != Lk allowed; q (B, Lq, N, D), k and v (B, Lk, N, D) -> (B, Lq, N, D)."""
    if q.t is None and k.t is None and v.t is None and not tangents_left_out():
        q_BNLD, k_BNLD, v_BNLD = (dual.x.transpose(1, 2) for dual in (q, k, v))
        return Dual(F.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD).transpose(1, 2))
    o, to = tk.attention_jvp(q.x, k.x, v.x, q.t, k.t, v.t)
    return Dual(o, None if tangents_left_out() else to)


class DenseAttention(nn.Module):
    """Every query attends to every key. There are no blocks, so the selection is always None."""

    def forward(self, q: Dual, k: Dual, v: Dual, selection: BlockMask | None = None) -> tuple[Dual, None]:
        return dense_attention(q, k, v), None


class SparseLinearAttention(nn.Module):
    """SLA: softmax attention over the kept key blocks, plus a projection P of linear attention over all keys.

    P is float32, zero at initialisation (SLA then is pure sparse attention) and shared by the heads. Its place in the
    module tree gives the published key `attn_op.local_attn.proj_l`.
    """

    def __init__(self, head_dim: int, config: AttentionConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        proj_l = WideLinear(head_dim, head_dim, device=device, dtype=torch.float32)
        self.local_attn = nn.ModuleDict({"proj_l": proj_l})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero P: the linear branch contributes nothing until it is trained."""
        for parameter in self.local_attn.parameters():
            nn.init.zeros_(parameter)

    def forward(self, q: Dual, k: Dual, v: Dual, selection: BlockMask | None = None) -> tuple[Dual, BlockMask]:
        """o (B, L, N, D) and the block lists used: `selection` if given, else chosen from q and k (no gradient)."""
        config = self.config
        projection = self.local_attn["proj_l"]
        weight, bias = projection.get_parameter("weight"), projection.get_parameter("bias")
        primals = (q.x, k.x, v.x)
        if q.t is k.t is v.t is None:
            if config.kind == "sage_sla" and selection is None and not torch.is_grad_enabled():
                blocks = config.topk, config.block_q, config.block_k
                o, selection = tk.sage_sla(*primals, weight, bias, *blocks, config.feature_map)
                return Dual(o), selection
            selection = self._selection(q.x, k.x, selection)
            sparse = self._sparse(*primals, selection)
            return Dual(tk.add_linear_attention(sparse, *primals, weight, bias, config.feature_map)), selection
        if q.t is None or k.t is None or v.t is None:
            raise ValueError("SLA takes the tangents of q, k and v together, or none")
        if config.kind == "sage_sla":
            raise ValueError("attention.kind=sage_sla has no tangent (inference only): use sla, of equal weights")
        selection = self._selection(q.x, k.x, selection)
        slopes = (q.t, k.t, v.t)
        sparse = tk.sparse_attention_jvp(*primals, *slopes, selection)
        o, to = tk.add_linear_attention_jvp(*sparse, *primals, *slopes, weight, bias, config.feature_map)
        return Dual(o, to), selection

    def _selection(self, q: Tensor, k: Tensor, given: BlockMask | None) -> BlockMask:
        if given is not None:
            return given
        with torch.no_grad():
            return tk.select_blocks(q, k, self.config.topk, self.config.block_q, self.config.block_k)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, selection: BlockMask) -> Tensor:
        if self.config.kind == "sla":
            return tk.sparse_attention(q, k, v, selection)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError(
                "attention.kind=sage_sla has no gradient (inference only): train with sla, of equal weights"
            )
        return tk.sage_sparse_attention(q, k, v, selection)


def build_attention(head_dim: int, config: AttentionConfig, device: torch.device | None = None) -> nn.Module:
    """The operator that `config` describes."""
    return SparseLinearAttention(head_dim, config, device) if config.is_sparse else DenseAttention()
