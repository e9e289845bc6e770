"""Triton forward of softmax attention together with its tangent, block-sparse or dense, in one pass over the keys
(method.md section 4, "JVP through attention").

With S = Q K^T / sqrt(D), P = softmax(S), dS = (dQ K^T + Q dK^T) / sqrt(D), W = P * dS:
  O = P V,   dO = P dV + W V - rowsum(W) O,
where every sum over keys is kept for the running maximum and rescaled when it moves, as in the online softmax.
DENSE: every block is kept, and there are no lists; block sizes then only bound the tiles.
Names and conventions: `attention_tiles.py`.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbokernels import tuning
from turbokernels.attention_tiles import (
    Gpu,
    describable,
    dot_rows,
    gpu_of,
    load_tile,
    lse_shape,
    mask_scores,
    next_tile,
    online_softmax,
    operand,
    probabilities,
    program_head,
    score_scale,
    store_lse,
    store_tile,
    strides_of,
)
from turbokernels.tuning import Launch


@triton.jit
def score_tangent(
    b_q, b_tq, b_k, p_tk, stride_tkb, stride_tkl, stride_tkn, i_key, length_k,
    R: tl.constexpr, T: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """dQ K^T + Q dK^T [R, T], of the tangents that there are. dK is read after the first product: it costs registers."""
    b_ts = tl.zeros([R, T], tl.float32)
    if TQ:
        if EXACT:
            b_ts += dot_rows(b_tq, b_k, EXACT)
        else:
            b_ts = tl.dot(b_tq, tl.trans(b_k), b_ts, input_precision="ieee")
    if TK:
        b_tk = load_tile(p_tk, stride_tkb, stride_tkl, stride_tkn, i_key, length_k, T, D, TMA)
        if EXACT:
            b_ts += dot_rows(b_q, b_tk, EXACT)
        else:
            b_ts = tl.dot(b_q, tl.trans(b_tk), b_ts, input_precision="ieee")
    return b_ts


@triton.jit(do_not_specialize=["length_q", "length_k", "n_kept"])
def jvp_kernel(
    p_q, p_k, p_v, p_tq, p_tk, p_tv, p_o, p_to, p_lse, p_kept,
    stride_qb, stride_ql, stride_qn,
    stride_kb, stride_kl, stride_kn,
    stride_vb, stride_vl, stride_vn,
    stride_tqb, stride_tql, stride_tqn,
    stride_tkb, stride_tkl, stride_tkn,
    stride_tvb, stride_tvl, stride_tvn,
    stride_ob, stride_ol, stride_on,
    length_q, length_k, n_kept, scale, score_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, T: tl.constexpr, TMA: tl.constexpr,
    DENSE: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, TV: tl.constexpr,
):  # fmt: skip
    """o, to (B, Lq, N, D, of equal strides) and lse, of `lse_shape`, for R query rows. TQ, TK, TV: which tangents there
    are; the others are zero, and their products are not computed."""
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    i_row = tl.program_id(0) * R
    b_q = load_tile(p_q, stride_qb, stride_ql, stride_qn, i_row, length_q, R, D, False)
    b_tq = b_q
    if TQ:
        b_tq = load_tile(p_tq, stride_tqb, stride_tql, stride_tqn, i_row, length_q, R, D, False)
    b_o = tl.zeros([R, D], tl.float32)
    b_to = tl.zeros([R, D], tl.float32)
    b_sum = tl.zeros([R], tl.float32)
    b_wsum = tl.zeros([R], tl.float32)
    b_max = tl.full([R], float("-inf"), tl.float32)

    p_list, n_steps = p_kept, tl.cdiv(length_k, T)
    if not DENSE:
        p_list += (program_head() * tl.cdiv(length_q, BLOCK_Q) + i_row // BLOCK_Q) * n_kept
        n_steps = n_kept * (BLOCK_K // T)
    if EXACT:
        # W V and rowsum(W) O nearly cancel. A pass of its own over the keys finds the mean of dS under P, without which
        # W = P * (dS - mean) has no row sum; in float64, as the backward's, since the mean may be far larger than the rest.
        b_total = tl.zeros([R], tl.float64)
        b_mean = tl.zeros([R], tl.float64)
        key_block = 0 if DENSE else tl.load(p_list)
        for step in range(0, n_steps):
            i_key, key_block = next_tile(p_list, key_block, step, n_kept, BLOCK_K, T, DENSE)
            b_k = load_tile(p_k, stride_kb, stride_kl, stride_kn, i_key, length_k, T, D, TMA)
            b_s = mask_scores(dot_rows(b_q, b_k, EXACT), i_key, length_k, T)
            b_p, b_max, b_alpha = online_softmax(b_s, b_max, score_scale, EXACT)
            b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
            if TQ or TK:
                b_ts = score_tangent(
                    b_q,
                    b_tq,
                    b_k,
                    p_tk,
                    stride_tkb,
                    stride_tkl,
                    stride_tkn,
                    i_key,
                    length_k,
                    R,
                    T,
                    D,
                    TMA,
                    TQ,
                    TK,
                    EXACT,
                )
                b_total = b_total * b_alpha + tl.sum(b_p.to(tl.float64), 1)
                b_mean = b_mean * b_alpha + tl.sum(b_p.to(tl.float64) * b_ts * scale, 1)
        if TQ or TK:
            b_mean = b_mean / b_total

    key_block = 0 if DENSE else tl.load(p_list)
    for step in range(0, n_steps):
        i_key, key_block = next_tile(p_list, key_block, step, n_kept, BLOCK_K, T, DENSE)
        b_k = load_tile(p_k, stride_kb, stride_kl, stride_kn, i_key, length_k, T, D, TMA)
        b_v = load_tile(p_v, stride_vb, stride_vl, stride_vn, i_key, length_k, T, D, TMA)
        b_s = mask_scores(dot_rows(b_q, b_k, EXACT), i_key, length_k, T)
        if EXACT:
            b_p = probabilities(b_s, score_scale, b_max[:, None], b_sum[:, None], EXACT)
        else:
            b_p, b_max, b_alpha = online_softmax(b_s, b_max, score_scale, EXACT)
            b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
            b_o *= b_alpha[:, None]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        if not EXACT:
            b_to *= b_alpha[:, None]
        if TV:
            b_tv = load_tile(p_tv, stride_tvb, stride_tvl, stride_tvn, i_key, length_k, T, D, TMA)
            b_to = tl.dot(b_p.to(b_v.dtype), b_tv, b_to, input_precision="ieee")
        if TQ or TK:
            b_ts = score_tangent(
                b_q, b_tq, b_k, p_tk, stride_tkb, stride_tkl, stride_tkn, i_key, length_k, R, T, D, TMA, TQ, TK, EXACT
            )
            if EXACT:
                b_w = (b_p * (b_ts.to(tl.float64) * scale - b_mean[:, None])).to(tl.float32)
            else:
                # The sum is of the rounded values that multiply V: a V of constant rows must have no tangent from W.
                b_w = (b_p * (b_ts * scale)).to(b_v.dtype)
                b_wsum = b_wsum * b_alpha + tl.sum(b_w.to(tl.float32), 1)
            b_to = tl.dot(b_w, b_v, b_to, input_precision="ieee")

    if not EXACT:
        b_o = b_o / b_sum[:, None]
        b_to = b_to / b_sum[:, None] - (b_wsum / b_sum)[:, None] * b_o
    store_tile(p_o, stride_ob, stride_ol, stride_on, i_row, length_q, b_o, R, D)
    store_tile(p_to, stride_ob, stride_ol, stride_on, i_row, length_q, b_to, R, D)
    store_lse(p_lse, i_row, length_q, b_max, b_sum, R, EXACT)


def jvp_candidates(dtype: torch.dtype, block_q: int, block_k: int, gpu: Gpu) -> list[Launch]:
    """Launch parameters, best guess first."""
    rows, keys, few = min(block_q, 64), min(block_k, 64), min(block_k, 32)
    if dtype == torch.float32:  # no matrix units: small tiles and many warps, so that registers hold the operands
        return [Launch(8, 1, R=16, T=16), Launch(4, 1, R=16, T=16)]
    narrow = [Launch(4, 2, R=rows, T=few), Launch(4, 1, R=rows, T=few), Launch(4, 2, R=min(block_q, 32), T=few)]
    if not gpu.is_large:
        return list(dict.fromkeys(narrow))
    candidates = [Launch(4, 2, R=rows, T=few), Launch(4, 1, R=rows, T=keys), Launch(4, 2, R=rows, T=keys)]
    if block_q == 128 and gpu.has_wgmma:
        candidates = [Launch(8, 2, R=128, T=keys), Launch(8, 3, R=128, T=few), *candidates]
    elif block_q == 128 and gpu.has_tensor_memory:  # whose 512 columns do not hold the accumulators of 128 x 64
        candidates = [Launch(8, 3, R=128, T=few), *candidates]
    return list(dict.fromkeys(candidates))


@torch.library.custom_op("turbokernels::attention_jvp", mutates_args=())
def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    kept: Tensor | None,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, to (B, Lq, N, D) like q but packed, and lse, float32 of `lse_shape`.

    q, tq: (B, Lq, N, D); k, v, tk, tv: (B, Lk, N, D). A tangent that is None is zero. kept None: dense.
    """
    batch, length_q, heads, dim = q.shape
    o, to = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    lse = torch.empty(lse_shape(q), dtype=torch.float32, device=q.device)
    kept, dense = None if kept is None else kept.contiguous(), kept is None
    tma = describable(k, v, tk, tv)

    def run(launch: Launch) -> None:
        k_keys, v_keys, tk_keys, tv_keys = (operand(x, launch["T"], tma) for x in (k, v, tk, tv))
        jvp_kernel[(triton.cdiv(length_q, launch["R"]), heads, batch)](
            q, k_keys, v_keys, tq, tk_keys, tv_keys, o, to, lse, kept,
            *strides_of(q), *strides_of(k), *strides_of(v),
            *strides_of(tq), *strides_of(tk), *strides_of(tv), *strides_of(o),
            length_q, k.shape[1], 0 if kept is None else kept.shape[3], dim**-0.5, score_scale(q),
            D=dim, BLOCK_Q=block_q, BLOCK_K=block_k, TMA=tma,
            DENSE=dense, TQ=tq is not None, TK=tk is not None, TV=tv is not None, **launch.kwargs(),
        )  # fmt: skip

    op = "attention_jvp" if dense else "sparse_attention_jvp"
    given = "".join(str(int(x is not None)) for x in (tq, tk, tv))
    candidates = jvp_candidates(q.dtype, block_q, block_k, gpu_of(q))
    run(tuning.best(op, (dim, q.dtype, block_q, block_k, given, tma), candidates, run, q.device))
    return o, to, lse


@jvp.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    kept: Tensor | None,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(lse_shape(q), dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape), lse
