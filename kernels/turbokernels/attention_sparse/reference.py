"""Specification of block-sparse attention and its tangent in plain PyTorch (method.md section 3 step 4 and section 4).

Each query block is one small attention problem against the tokens of its kept key blocks, which are gathered. That
costs topk of a dense product (5 times faster than a boolean mask at topk 0.2 on a CPU), and groups of query blocks go
through in chunks, so that memory is bounded at any length.

Shape suffixes: B batch, L tokens, N heads, D head dim; X query blocks of all heads and samples (B * N * I), Y key
blocks of all heads and samples (B * N * J), M kept key blocks per query block; Q tokens of a query block, T tokens of a
key block, K gathered key tokens (M * T); G the query blocks of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from turbokernels.blocks import BlockMask
from turbokernels.softmax_core import chunk_size, compute_dtype, gradients, output_tangent, probabilities


def to_blocks(x_BLND: Tensor, block: int) -> Tensor:
    """Cut (B, L, N, D) into blocks (B * N * blocks, block, D), by sample, then head; a ragged one is padded with 0."""
    padding = -x_BLND.shape[1] % block
    if padding:
        x_BLND = F.pad(x_BLND, (0, 0, 0, 0, 0, padding))
    return x_BLND.unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4).flatten(0, 2)


def from_blocks(x_XQD: Tensor, like_BLND: Tensor) -> Tensor:
    """Inverse of `to_blocks` into the shape and dtype of `like_BLND`; what was padded is dropped."""
    batch, length, heads, _ = like_BLND.shape
    x_BNIQD = x_XQD.unflatten(0, (batch, heads, -1))
    return x_BNIQD.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length].to(like_BLND.dtype)


class KeptBlocks:
    """The rows of `to_blocks(k)` that each query block attends to, chunk by chunk."""

    def __init__(self, mask: BlockMask, head_dim: int) -> None:
        self.mask = mask
        kept_XM = mask.kept.flatten(0, 2)
        self.last_XM = kept_XM == mask.n_k_blocks - 1
        head_X = torch.arange(kept_XM.shape[0], device=kept_XM.device) // mask.n_q_blocks
        self.rows_XM = kept_XM.long() + (head_X * mask.n_k_blocks).unsqueeze(1)
        # The largest temporary of a query block: its scores, or its gathered keys.
        n_keys = mask.n_kept * mask.block_k
        self.step = chunk_size(n_keys * max(mask.block_q, head_dim), kept_XM.device)

    def chunks(self) -> list[slice]:
        """Slices of X, each of which fits the memory budget."""
        n_groups = self.rows_XM.shape[0]
        return [slice(start, min(start + self.step, n_groups)) for start in range(0, n_groups, self.step)]

    def gather(self, x_YTD: Tensor, chunk: slice) -> Tensor:
        """The kept key blocks of a chunk's query blocks, side by side: (G, K, D)."""
        rows_GM = self.rows_XM[chunk]
        return x_YTD.flatten(1).index_select(0, rows_GM.flatten()).view(len(rows_GM), -1, x_YTD.shape[2])

    def scatter_add(self, x_YTD: Tensor, x_GKD: Tensor, chunk: slice) -> None:
        """Add each gathered block's values back to its row: the adjoint of `gather`."""
        rows_GM = self.rows_XM[chunk]
        x_YTD.view(len(x_YTD), -1).index_add_(0, rows_GM.flatten(), x_GKD.reshape(rows_GM.numel(), -1))

    def valid(self, chunk: slice) -> Tensor | None:
        """bool (G, 1, K): which gathered tokens exist; None when no block is ragged."""
        tail = self.mask.length_k % self.mask.block_k
        if not tail:
            return None
        inside_T = torch.arange(self.mask.block_k, device=self.last_XM.device) < tail
        return (~self.last_XM[chunk].unsqueeze(2) | inside_T).flatten(1).unsqueeze(1)


class _SparseAttention(torch.autograd.Function):
    """(o, to) or (o, None): o is differentiable with respect to q, k, v; the tangent to is not."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q_BLND: Tensor,
        k_BLND: Tensor,
        v_BLND: Tensor,
        mask: BlockMask,
        tq_BLND: Tensor | None,
        tk_BLND: Tensor | None,
        tv_BLND: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q_BLND, k_BLND, v_BLND)
        ctx.mask = mask
        kept = KeptBlocks(mask, q_BLND.shape[3])
        dtype = compute_dtype(q_BLND.dtype)
        scale = q_BLND.shape[3] ** -0.5
        q_XQD = to_blocks(q_BLND, mask.block_q)
        k_YTD, v_YTD = to_blocks(k_BLND, mask.block_k), to_blocks(v_BLND, mask.block_k)
        o_XQD = torch.empty_like(q_XQD)
        tangents = None
        if tq_BLND is not None and tk_BLND is not None and tv_BLND is not None:
            tangents = (
                to_blocks(tq_BLND, mask.block_q),
                to_blocks(tk_BLND, mask.block_k),
                to_blocks(tv_BLND, mask.block_k),
            )
        to_XQD = torch.empty_like(q_XQD) if tangents else None

        with torch.autocast(q_BLND.device.type, enabled=False):
            for chunk in kept.chunks():
                q_GQD = q_XQD[chunk].to(dtype) * scale
                k_GKD, v_GKD = kept.gather(k_YTD, chunk).to(dtype), kept.gather(v_YTD, chunk).to(dtype)
                p_GQK = probabilities(q_GQD, k_GKD, kept.valid(chunk))
                o_GQD = torch.bmm(p_GQK, v_GKD)
                o_XQD[chunk] = o_GQD
                if tangents and to_XQD is not None:
                    tq_GQD = tangents[0][chunk].to(dtype) * scale
                    tk_GKD, tv_GKD = (kept.gather(x_YTD, chunk).to(dtype) for x_YTD in tangents[1:])
                    to_XQD[chunk] = output_tangent(p_GQK, q_GQD, k_GKD, v_GKD, o_GQD, tq_GQD, tk_GKD, tv_GKD)

        o_BLND = from_blocks(o_XQD, q_BLND)
        if to_XQD is None:
            return o_BLND, None
        to_BLND = from_blocks(to_XQD, q_BLND)
        ctx.mark_non_differentiable(to_BLND)
        return o_BLND, to_BLND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BLND: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if do_BLND is None:
            return (None,) * 7
        q_BLND, k_BLND, v_BLND = ctx.saved_tensors
        mask: BlockMask = ctx.mask
        kept = KeptBlocks(mask, q_BLND.shape[3])
        dtype = compute_dtype(q_BLND.dtype)
        scale = q_BLND.shape[3] ** -0.5
        q_XQD, do_XQD = to_blocks(q_BLND, mask.block_q), to_blocks(do_BLND, mask.block_q)
        k_YTD, v_YTD = to_blocks(k_BLND, mask.block_k), to_blocks(v_BLND, mask.block_k)
        dq_XQD = torch.empty_like(q_XQD)
        # Many query blocks add to one key block: sum them in the dtype of the arithmetic, round once at the end.
        dk_YTD, dv_YTD = torch.zeros_like(k_YTD, dtype=dtype), torch.zeros_like(v_YTD, dtype=dtype)

        with torch.autocast(q_BLND.device.type, enabled=False):
            for chunk in kept.chunks():
                # The probabilities are computed again: keeping them would cost L^2 topk memory in every layer.
                q_GQD = q_XQD[chunk].to(dtype) * scale
                k_GKD, v_GKD = kept.gather(k_YTD, chunk).to(dtype), kept.gather(v_YTD, chunk).to(dtype)
                p_GQK = probabilities(q_GQD, k_GKD, kept.valid(chunk))
                dq_GQD, dk_GKD, dv_GKD = gradients(p_GQK, q_GQD, k_GKD, v_GKD, do_XQD[chunk].to(dtype))
                dq_XQD[chunk] = dq_GQD * scale
                kept.scatter_add(dk_YTD, dk_GKD, chunk)
                kept.scatter_add(dv_YTD, dv_GKD, chunk)

        grads = (from_blocks(dq_XQD, q_BLND), from_blocks(dk_YTD, k_BLND), from_blocks(dv_YTD, v_BLND))
        return (*grads, None, None, None, None)


def sparse_attention(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, mask: BlockMask) -> Tensor:
    """o (B, L, N, D): softmax over the tokens of the kept key blocks only, scale 1 / sqrt(D)."""
    return _SparseAttention.apply(q_BLND, k_BLND, v_BLND, mask, None, None, None)[0]  # pyright: ignore[reportOptionalSubscript]


def sparse_attention_jvp(
    q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, tq_BLND: Tensor, tk_BLND: Tensor, tv_BLND: Tensor, mask: BlockMask
) -> tuple[Tensor, Tensor]:
    """(o, to): `sparse_attention` and its directional derivative; the mask has zero tangent."""
    return _SparseAttention.apply(q_BLND, k_BLND, v_BLND, mask, tq_BLND, tk_BLND, tv_BLND)  # pyright: ignore[reportReturnType]
