"""Specification of SageAttention's quantisation, emulated in plain PyTorch (arXiv 2411.10958; method.md end of section
7).

Every value that a kernel would hold in 8 or 16 bits is rounded to that format; products accumulate in float32, which is
exact for int8 at head dims up to 1,024. Shape suffixes: as in `attention_sparse/reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokernels.attention_sparse.reference import KeptBlocks, from_blocks, to_blocks
from turbokernels.blocks import BlockMask

FP8_MAX = 448.0  # largest e4m3 value
DENSE_BLOCK_Q, DENSE_BLOCK_K = 128, 64  # tokens that share one scale when no mask says otherwise (the paper's tiles)


def pv_format(device: torch.device) -> str:
    """What P V runs in on this device: fp8 on sm89, sm90 and sm120, fp16 elsewhere (method.md section 7)."""
    if device.type != "cuda":
        return "fp16"
    major, minor = torch.cuda.get_device_capability(device)
    return "fp8" if (major, minor) in ((8, 9), (9, 0), (12, 0)) else "fp16"


def quantize_blocks(x_XQD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values, held in float32, and a scale per block, amax / 127 (1 for a zero block): x ~ values * scale."""
    scale_X11 = x_XQD.abs().amax((1, 2), keepdim=True) / 127.0
    scale_X11 = torch.where(scale_X11 == 0.0, 1.0, scale_X11)
    return (x_XQD / scale_X11).round().clamp(-127.0, 127.0), scale_X11


def _round_values(v_BLND: Tensor, pv: str) -> tuple[Tensor, Tensor]:
    """v in the format of P V, and its scale per channel (B, 1, N, D): amax over tokens / 448 for fp8, 1 for fp16."""
    if pv == "fp16":
        return v_BLND.half().float(), torch.ones_like(v_BLND[:, :1])
    scale_B1ND = v_BLND.abs().amax(1, keepdim=True) / FP8_MAX
    scale_B1ND = torch.where(scale_B1ND == 0.0, 1.0, scale_B1ND)
    return (v_BLND / scale_B1ND).to(torch.float8_e4m3fn).float(), scale_B1ND


def _round_probabilities(p_GQK: Tensor, pv: str) -> Tensor:
    """Unnormalised probabilities in (0, 1] in the format of P V; fp8 uses its whole range."""
    return p_GQK.half().float() if pv == "fp16" else (p_GQK * FP8_MAX).to(torch.float8_e4m3fn).float() / FP8_MAX


def sage_sparse_attention(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, mask: BlockMask, pv: str) -> Tensor:
    """o (B, Lq, N, D): attention over the kept blocks; q and smoothed k in int8 with a scale per block of the mask.

    Softmax and its row sum are float32 and unrounded, as a kernel keeps them.
    """
    kept = KeptBlocks(mask, q_BLND.shape[3])
    smooth_k_BLND = k_BLND.float() - k_BLND.float().mean(1, keepdim=True)
    q_XQD, q_scale_X11 = quantize_blocks(to_blocks(q_BLND.float(), mask.block_q))
    k_YTD, k_scale_Y11 = quantize_blocks(to_blocks(smooth_k_BLND, mask.block_k))
    rounded_v_BLND, v_scale_B1ND = _round_values(v_BLND.float(), pv)
    v_YTD = to_blocks(rounded_v_BLND, mask.block_k)
    k_scale_YT1 = k_scale_Y11.expand(-1, mask.block_k, 1)
    o_XQD = torch.empty_like(q_XQD)
    with torch.autocast(q_BLND.device.type, enabled=False):
        for chunk in kept.chunks():
            s_GQK = torch.bmm(q_XQD[chunk], kept.gather(k_YTD, chunk).mT)
            s_GQK *= q_scale_X11[chunk] * q_BLND.shape[3] ** -0.5 * kept.gather(k_scale_YT1, chunk).mT
            valid_G1K = kept.valid(chunk)
            if valid_G1K is not None:
                s_GQK.masked_fill_(~valid_G1K, float("-inf"))
            p_GQK = torch.exp(s_GQK - s_GQK.amax(-1, keepdim=True))
            o_GQD = torch.bmm(_round_probabilities(p_GQK, pv), kept.gather(v_YTD, chunk))
            o_XQD[chunk] = o_GQD / p_GQK.sum(-1, keepdim=True)
    return (from_blocks(o_XQD, q_BLND.float()) * v_scale_B1ND).to(q_BLND.dtype)


def sage_attention(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, pv: str) -> Tensor:
    """o (B, Lq, N, D): the same over all keys, with scales per 128 query and 64 key tokens."""
    batch, length_q, heads, _ = q_BLND.shape
    length_k = k_BLND.shape[1]
    n_q_blocks, n_k_blocks = -(-length_q // DENSE_BLOCK_Q), -(-length_k // DENSE_BLOCK_K)
    all_M = torch.arange(n_k_blocks, dtype=torch.int32, device=q_BLND.device)
    mask = BlockMask(all_M.expand(batch, heads, n_q_blocks, -1), DENSE_BLOCK_Q, DENSE_BLOCK_K, length_q, length_k)
    return sage_sparse_attention(q_BLND, k_BLND, v_BLND, mask, pv)
