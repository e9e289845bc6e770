"""Triton forward of block-sparse attention (method.md section 3, step 4): one program per tile of query rows walks its
list of kept key blocks with an online softmax. Names and conventions: `attention_tiles.py`.

Shape suffixes: B batch, L tokens, N heads, D head dim, I query blocks, M kept key blocks per query block.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from turbokernels import tuning
from turbokernels.attention_sparse.kernel_backward import backward
from turbokernels.attention_sparse.kernel_jvp import jvp
from turbokernels.attention_tiles import (
    Gpu,
    check_kernel_operands,
    describable,
    divide,
    dot_rows,
    gpu_of,
    load_tile,
    lse_shape,
    mask_scores,
    next_tile,
    online_softmax,
    operand,
    program_head,
    score_scale,
    store_lse,
    store_tile,
    strides_of,
)
from turbokernels.blocks import BlockMask
from turbokernels.recompute import refuse_tangents
from turbokernels.tuning import Launch


@triton.jit(do_not_specialize=["length_q", "length_k", "n_kept"])
def forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_kept,
    stride_qb, stride_ql, stride_qn,
    stride_kb, stride_kl, stride_kn,
    stride_vb, stride_vl, stride_vn,
    stride_ob, stride_ol, stride_on,
    length_q, length_k, n_kept, score_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, T: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """o (B, Lq, N, D), and lse, of `lse_shape`, for R rows of one query block."""
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    i_row = tl.program_id(0) * R
    p_list = p_kept + (program_head() * tl.cdiv(length_q, BLOCK_Q) + i_row // BLOCK_Q) * n_kept
    b_q = load_tile(p_q, stride_qb, stride_ql, stride_qn, i_row, length_q, R, D, False)
    b_o = tl.zeros([R, D], tl.float32)
    b_sum = tl.zeros([R], tl.float32)
    b_max = tl.full([R], float("-inf"), tl.float32)

    key_block = tl.load(p_list)
    for step in range(0, n_kept * (BLOCK_K // T)):
        i_key, key_block = next_tile(p_list, key_block, step, n_kept, BLOCK_K, T, False)
        b_k = load_tile(p_k, stride_kb, stride_kl, stride_kn, i_key, length_k, T, D, TMA)
        b_v = load_tile(p_v, stride_vb, stride_vl, stride_vn, i_key, length_k, T, D, TMA)
        b_s = mask_scores(dot_rows(b_q, b_k, EXACT), i_key, length_k, T)
        b_p, b_max, b_alpha = online_softmax(b_s, b_max, score_scale, EXACT)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_alpha[:, None], input_precision="ieee")

    store_tile(p_o, stride_ob, stride_ol, stride_on, i_row, length_q, divide(b_o, b_sum[:, None], EXACT), R, D)
    store_lse(p_lse, i_row, length_q, b_max, b_sum, R, EXACT)


def forward_candidates(dtype: torch.dtype, block_q: int, block_k: int, gpu: Gpu) -> list[Launch]:
    """Launch parameters for the forward, best guess first. Four warps on 128 x 64 let two programs share an H200's
    multiprocessor: one computes its softmax while the other multiplies."""
    if dtype == torch.float32:  # no matrix units: small tiles, which registers can hold
        return [Launch(4, 1, R=min(block_q, 32), T=min(block_k, 32))]
    rows, keys = min(block_q, 64), min(block_k, 64)
    if not gpu.is_large:
        return list(dict.fromkeys([Launch(4, 2, R=rows, T=min(block_k, 32)), Launch(4, 2, R=rows, T=keys)]))
    candidates = [Launch(4, 2, R=rows, T=keys), Launch(4, 3, R=rows, T=keys)]
    if block_q == 128:
        four, eight = ([Launch(warps, stages, R=128, T=keys) for stages in (2, 3)] for warps in (4, 8))
        deep = Launch(4, 4, R=128, T=min(block_k, 32))  # narrow products, but two programs and loads three steps ahead
        candidates = [*four, *eight, deep, *candidates] if gpu.has_wgmma else [*eight, *candidates]
    if block_q == block_k == 128:
        candidates += [Launch(8, 2, R=128, T=128)]
    return list(dict.fromkeys(candidates))


@torch.library.custom_op("turbokernels::sparse_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """o (B, Lq, N, D) like q but packed, and lse, float32 of `lse_shape`."""
    batch, length_q, heads, dim = q.shape
    kept = kept.contiguous()
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape(q), dtype=torch.float32, device=q.device)
    tma = describable(k, v)

    def run(launch: Launch) -> None:
        rows, keys = launch["R"], launch["T"]
        forward_kernel[(triton.cdiv(length_q, rows), heads, batch)](
            q, operand(k, keys, tma), operand(v, keys, tma), o, lse, kept,
            *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(o),
            length_q, k.shape[1], kept.shape[3], score_scale(q),
            D=dim, BLOCK_Q=block_q, BLOCK_K=block_k, TMA=tma, **launch.kwargs(),
        )  # fmt: skip

    candidates = forward_candidates(q.dtype, block_q, block_k, gpu_of(q))
    run(tuning.best("sparse_attention", (dim, q.dtype, block_q, block_k, tma), candidates, run, q.device))
    return o, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(lse_shape(q), dtype=torch.float32)


class _SparseAttention(torch.autograd.Function):
    """(o, to) or (o, None): o is differentiable with respect to q, k, v; the tangent to is not."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tq: Tensor | None,
        tk: Tensor | None,
        tv: Tensor | None,
        kept: Tensor,
        block_q: int,
        block_k: int,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.blocks = block_q, block_k
        to = None
        if tq is None:
            o, lse = _forward(q, k, v, kept, block_q, block_k)
        else:
            o, to, lse = jvp(q, k, v, tq, tk, tv, kept, block_q, block_k)
            ctx.mark_non_differentiable(to)
        ctx.save_for_backward(q, k, v, o, lse, kept)
        return o, to

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if do is None:
            return (None,) * 9
        q, k, v, o, lse, kept = ctx.saved_tensors
        return (*backward(q, k, v, o, lse, do, kept, *ctx.blocks), *(None,) * 6)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """As reference.sparse_attention."""
    check_kernel_operands("sparse_attention", q)
    refuse_tangents("sparse_attention", q, k, v)
    lists = mask.kept, mask.block_q, mask.block_k
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _SparseAttention.apply(q, k, v, None, None, None, *lists)[0]  # pyright: ignore[reportOptionalSubscript]
    return _forward(q, k, v, *lists)[0]


def sparse_attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, mask: BlockMask
) -> tuple[Tensor, Tensor]:
    """As reference.sparse_attention_jvp."""
    check_kernel_operands("sparse_attention_jvp", q)
    refuse_tangents("sparse_attention_jvp", q, k, v, tq, tk, tv)
    return _SparseAttention.apply(q, k, v, tq, tk, tv, mask.kept, mask.block_q, mask.block_k)  # pyright: ignore[reportReturnType]
