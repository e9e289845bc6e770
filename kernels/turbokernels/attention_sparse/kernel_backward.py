"""Triton backward of block-sparse and of dense softmax attention: two passes, without atomics and without scanning.

One pass gives dQ: a program per tile of query rows walks its list of kept key blocks. The other gives dK and dV: a
program per tile of keys walks the transposed list, the query blocks that keep it. Probabilities are computed again from
the forward's lse in both. With P the probabilities and scale 1 / sqrt(D), as in `softmax_core.gradients`:
  delta = rowsum(dO * O) = rowsum(P * dO V^T); dS = P * (dO V^T - delta); dQ = scale dS K; dK = scale dS^T Q; dV = P^T dO.
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
    load_lse,
    load_tile,
    mask_scores,
    next_tile,
    operand,
    probabilities,
    program_head,
    score_scale,
    store_tile,
    strides_of,
)
from turbokernels.blocks import BlockMask
from turbokernels.tuning import Launch


@triton.jit(do_not_specialize=["length_q", "length_k", "n_kept"])
def backward_q_kernel(
    p_q, p_k, p_v, p_o, p_do, p_dq, p_lse, p_delta, p_kept,
    stride_qb, stride_ql, stride_qn,
    stride_kb, stride_kl, stride_kn,
    stride_vb, stride_vl, stride_vn,
    stride_ob, stride_ol, stride_on,
    stride_gb, stride_gl, stride_gn,
    stride_db, stride_dl, stride_dn,
    length_q, length_k, n_kept, scale, score_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, T: tl.constexpr, TMA: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """dq (B, Lq, N, D), and delta (B, N, Lq) for the other pass, for R rows of one query block."""
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    i_row = tl.program_id(0) * R
    rows = i_row + tl.arange(0, R)
    b_q = load_tile(p_q, stride_qb, stride_ql, stride_qn, i_row, length_q, R, D, False)
    b_do = load_tile(p_do, stride_gb, stride_gl, stride_gn, i_row, length_q, R, D, False)
    p_delta += program_head() * length_q + rows
    b_shift, b_sum = load_lse(p_lse, tl.minimum(rows, length_q - 1), length_q, EXACT)
    if EXACT:
        b_sum_dp = tl.zeros([R], tl.float64)
        b_total = tl.zeros([R], tl.float64)
        b_delta = tl.zeros([R], tl.float32)
    else:
        b_o = load_tile(p_o, stride_ob, stride_ol, stride_on, i_row, length_q, R, D, False)
        b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
        tl.store(p_delta, b_delta, mask=rows < length_q)
    b_dq = tl.zeros([R, D], tl.float32)

    p_list, n_steps = p_kept, tl.cdiv(length_k, T)
    if not DENSE:
        p_list += (program_head() * tl.cdiv(length_q, BLOCK_Q) + i_row // BLOCK_Q) * n_kept
        n_steps = n_kept * (BLOCK_K // T)
    # dO V^T and delta nearly cancel where a row has one key that counts. EXACT takes a pass of its own over the keys for
    # delta = rowsum(P * dO V^T) / rowsum(P), in float64, so that the rows of dS sum to zero also where these scores are not
    # the forward's to the last bit: keys may share a large offset.
    for i_pass in tl.static_range(0 if EXACT else 1, 2):
        key_block = 0 if DENSE else tl.load(p_list)
        for step in range(0, n_steps):
            i_key, key_block = next_tile(p_list, key_block, step, n_kept, BLOCK_K, T, DENSE)
            b_k = load_tile(p_k, stride_kb, stride_kl, stride_kn, i_key, length_k, T, D, TMA)
            b_v = load_tile(p_v, stride_vb, stride_vl, stride_vn, i_key, length_k, T, D, TMA)
            b_s = mask_scores(dot_rows(b_q, b_k, EXACT), i_key, length_k, T)
            b_dp = dot_rows(b_do, b_v, EXACT)
            b_p = probabilities(b_s, score_scale, b_shift[:, None], b_sum[:, None], EXACT)
            if i_pass == 0:
                b_sum_dp += tl.sum(b_p.to(tl.float64) * b_dp, 1)
                b_total += tl.sum(b_p.to(tl.float64), 1)
            else:
                b_ds = b_p * (b_dp - b_delta[:, None])
                b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
        if i_pass == 0:
            b_delta = (b_sum_dp / b_total).to(tl.float32)
            tl.store(p_delta, b_delta, mask=rows < length_q)

    store_tile(p_dq, stride_db, stride_dl, stride_dn, i_row, length_q, b_dq * scale, R, D)


@triton.jit(do_not_specialize=["length_q", "length_k", "n_pairs"])
def backward_kv_kernel(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_lse, p_delta, p_q_blocks, p_offsets,
    stride_qb, stride_ql, stride_qn,
    stride_kb, stride_kl, stride_kn,
    stride_vb, stride_vl, stride_vn,
    stride_gb, stride_gl, stride_gn,
    stride_db, stride_dl, stride_dn,
    length_q, length_k, n_pairs, scale, score_scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, T: tl.constexpr, TMA: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, Lk, N, D, of equal strides) for T keys of one key block; n_pairs: I * M, the length of a head's
    transposed lists. Scores are computed transposed, [T, R], so that they are left operands without a move."""
    EXACT: tl.constexpr = p_k.dtype.element_ty == tl.float32
    i_key = tl.program_id(0) * T
    b_k = load_tile(p_k, stride_kb, stride_kl, stride_kn, i_key, length_k, T, D, False)
    b_v = load_tile(p_v, stride_vb, stride_vl, stride_vn, i_key, length_k, T, D, False)
    b_dk = tl.zeros([T, D], tl.float32)
    b_dv = tl.zeros([T, D], tl.float32)
    p_delta += program_head() * length_q

    p_list, n_blocks, n_steps = p_q_blocks, 0, tl.cdiv(length_q, R)
    q_block = 0
    if not DENSE:
        p_start = p_offsets + program_head() * (tl.cdiv(length_k, BLOCK_K) + 1) + i_key // BLOCK_K
        start = tl.load(p_start)
        n_blocks = tl.load(p_start + 1) - start
        n_steps = n_blocks * (BLOCK_Q // R)
        p_list += program_head() * n_pairs + start
        q_block = tl.load(p_list, mask=n_blocks > 0, other=0)
    for step in range(0, n_steps):
        i_row, q_block = next_tile(p_list, q_block, step, n_blocks, BLOCK_Q, R, DENSE)
        b_q = load_tile(p_q, stride_qb, stride_ql, stride_qn, i_row, length_q, R, D, TMA)
        b_do = load_tile(p_do, stride_gb, stride_gl, stride_gn, i_row, length_q, R, D, TMA)
        rows = tl.minimum(i_row + tl.arange(0, R), length_q - 1)
        b_shift, b_sum = load_lse(p_lse, rows, length_q, EXACT)
        b_delta = tl.load(p_delta + rows)
        b_s = mask_scores(dot_rows(b_k, b_q, EXACT), i_row, length_q, R)
        b_p = probabilities(b_s, score_scale, b_shift[None, :], b_sum[None, :], EXACT)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = dot_rows(b_v, b_do, EXACT)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")

    store_tile(p_dk, stride_db, stride_dl, stride_dn, i_key, length_k, b_dk * scale, T, D)
    store_tile(p_dv, stride_db, stride_dl, stride_dn, i_key, length_k, b_dv, T, D)


def _float32_candidates(block_q: int, block_k: int) -> list[Launch]:
    """No matrix units: small tiles and many warps, so that registers hold the operands."""
    return list(dict.fromkeys([Launch(8, 1, R=min(block_q, 32), T=min(block_k, 32)), Launch(4, 1, R=16, T=16)]))


def backward_q_candidates(dtype: torch.dtype, block_q: int, block_k: int, gpu: Gpu) -> list[Launch]:
    """Launch parameters for dQ, best guess first."""
    if dtype == torch.float32:
        return _float32_candidates(block_q, block_k)
    rows, keys, few = min(block_q, 64), min(block_k, 64), min(block_k, 32)
    if not gpu.is_large:
        return [Launch(4, 2, R=rows, T=few), Launch(4, 1, R=rows, T=few)]
    candidates = [Launch(4, 2, R=rows, T=keys), Launch(4, 3, R=rows, T=keys)]
    if block_q == 128 and gpu.has_wgmma:
        wide = [Launch(8, 2, R=128, T=keys), Launch(4, 2, R=128, T=few), Launch(8, 3, R=128, T=keys)]
        candidates = wide + candidates
    return list(dict.fromkeys(candidates))


def backward_kv_candidates(dtype: torch.dtype, block_q: int, block_k: int, gpu: Gpu) -> list[Launch]:
    """Launch parameters for dK and dV, best guess first."""
    if dtype == torch.float32:
        return _float32_candidates(block_q, block_k)
    rows, keys, few = min(block_q, 64), min(block_k, 64), min(block_q, 32)
    if not gpu.is_large:
        return [Launch(4, 2, R=few, T=keys)]
    candidates = [Launch(4, 2, R=rows, T=keys), Launch(4, 3, R=rows, T=keys)]
    candidates += [Launch(4, 3, R=few, T=keys), Launch(4, 2, R=few, T=keys)]
    if block_k == 128 and gpu.has_wgmma:
        candidates += [Launch(8, 2, R=rows, T=128)]
    return list(dict.fromkeys(candidates))


@torch.library.custom_op("turbokernels::attention_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, kept: Tensor | None, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(do * o) with respect to q, k and v; packed, in their dtype.

    q, o, do: (B, Lq, N, D); k, v: (B, Lk, N, D); lse: from the forward. kept None: dense.
    """
    batch, length_q, heads, dim = q.shape
    length_k, dense, scale = k.shape[1], kept is None, dim**-0.5
    do = do if do.stride(3) == 1 else do.contiguous()  # a broadcast gradient, such as that of a sum
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    delta = torch.empty(batch, heads, length_q, dtype=torch.float32, device=q.device)
    q_blocks, offsets, n_pairs, n_kept = None, None, 0, 0
    if kept is not None:
        mask = BlockMask(kept.contiguous(), block_q, block_k, length_q, length_k)
        kept, q_blocks, offsets, n_kept = mask.kept, mask.q_blocks, mask.offsets, mask.n_kept
        n_pairs = q_blocks.shape[2]
    constants = {"D": dim, "BLOCK_Q": block_q, "BLOCK_K": block_k, "DENSE": dense}
    gpu = gpu_of(q)
    tma_q, tma_kv = describable(k, v), describable(q, do)

    def run_q(launch: Launch) -> None:
        keys = launch["T"]
        backward_q_kernel[(triton.cdiv(length_q, launch["R"]), heads, batch)](
            q, operand(k, keys, tma_q), operand(v, keys, tma_q), o, do, dq, lse, delta, kept,
            *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(o), *strides_of(do), *strides_of(dq),
            length_q, length_k, n_kept, scale, score_scale(q),
            TMA=tma_q, **constants, **launch.kwargs(),
        )  # fmt: skip

    def run_kv(launch: Launch) -> None:
        rows = launch["R"]
        backward_kv_kernel[(triton.cdiv(length_k, launch["T"]), heads, batch)](
            operand(q, rows, tma_kv), k, v, operand(do, rows, tma_kv), dk, dv, lse, delta, q_blocks, offsets,
            *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(do), *strides_of(dk),
            length_q, length_k, n_pairs, scale, score_scale(q),
            TMA=tma_kv, **constants, **launch.kwargs(),
        )  # fmt: skip

    op = "attention" if dense else "sparse_attention"
    candidates = backward_q_candidates(q.dtype, block_q, block_k, gpu)
    run_q(tuning.best(f"{op}_backward_q", (dim, q.dtype, block_q, block_k, tma_q), candidates, run_q, q.device))
    candidates = backward_kv_candidates(q.dtype, block_q, block_k, gpu)
    run_kv(tuning.best(f"{op}_backward_kv", (dim, q.dtype, block_q, block_k, tma_kv), candidates, run_kv, q.device))
    return dq, dk, dv


@backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, kept: Tensor | None, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
