# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""Triton kernel of the norm between convolutions: few channels and many positions, so a program holds a tile of positions.

Shape suffixes: B batch, L positions, C channels.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbokernels.fused_rms_silu import reference
from turbokernels.rows import DTYPES
from turbokernels.tuning import Launch, best

MAX_CHANNELS = 4096
_SMALLEST_NORM = tl.constexpr(reference.SMALLEST_NORM)


@triton.jit(do_not_specialize=["length"])
def _rms_silu_kernel(
    p_x,
    p_weight,
    p_residual,
    p_total,
    p_out,
    length,
    stride_out,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """BLOCK_L positions of one sample. p_residual may be None; else x + residual goes to p_total, which may be p_x."""
    i_b = tl.program_id(1).to(tl.int64)
    i_l = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < CHANNELS
    mask = (i_l < length)[:, None] & m_c[None, :]  # [BL, BC]
    b_offset = (i_b * length + i_l)[:, None] * CHANNELS + i_c[None, :]
    b_x = tl.load(p_x + b_offset, mask=mask, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_x += tl.load(p_residual + b_offset, mask=mask, other=0.0).to(tl.float32)
        b_total = b_x.to(p_total.dtype.element_ty)
        tl.store(p_total + b_offset, b_total, mask=mask)
        b_x = b_total.to(tl.float32)  # the norm is of the stream as it is stored
    b_norm = tl.maximum(tl.sqrt_rn(tl.sum(b_x * b_x, 1)), _SMALLEST_NORM)  # [BL]
    b_weight = tl.load(p_weight + i_c, mask=m_c, other=0.0).to(tl.float32) * (CHANNELS**0.5)
    b_y = b_x * tl.div_rn(1.0, b_norm)[:, None] * b_weight[None, :]
    b_y = b_y / (1.0 + tl.exp(-b_y))
    p_place = p_out + i_b * stride_out + i_l[:, None] * CHANNELS + i_c[None, :]
    tl.store(p_place, b_y.to(p_out.dtype.element_ty), mask=mask)


@functools.cache
def launches(channels: int) -> tuple[Launch, ...]:
    """Candidates for rows of so many channels: 32 values of a thread first, which leaves many loads in flight."""
    block_c = triton.next_power_of_2(channels)
    sizes = ((4, 4096), (4, 2048), (8, 8192), (8, 4096))
    return tuple(Launch(warps, 1, BLOCK_L=max(1, size // block_c)) for warps, size in sizes)


def rms_norm_silu(x_BLC: Tensor, weight_C: Tensor, residual_BLC: Tensor | None, out_BLC: Tensor) -> None:
    """As reference.rms_norm_silu."""
    batch, length, channels = x_BLC.shape
    if x_BLC.dtype not in DTYPES:
        raise ValueError(
            f"rms_norm_silu: the kernel computes in float32 and x has dtype {x_BLC.dtype}; use impl='reference'"
        )
    if channels > MAX_CHANNELS:
        raise ValueError(
            f"rms_norm_silu: the kernel holds rows of up to {MAX_CHANNELS} channels and x has {channels}; "
            "use impl='reference'"
        )
    if not x_BLC.numel():
        return

    def run(launch: Launch, total_BLC: Tensor) -> None:
        _rms_silu_kernel[(triton.cdiv(length, launch["BLOCK_L"]), batch)](
            x_BLC,
            weight_C,
            residual_BLC,
            total_BLC,
            out_BLC,
            length,
            out_BLC.stride(0),
            CHANNELS=channels,
            BLOCK_C=triton.next_power_of_2(channels),
            **launch.kwargs(),
        )

    def try_out(launch: Launch) -> None:  # launches are tried on the real operands, and x is to be added to once
        run(launch, x_BLC if residual_BLC is None else torch.empty_like(x_BLC))

    key = (channels, x_BLC.dtype, residual_BLC is not None)
    run(best("rms_norm_silu", key, launches(channels), try_out, x_BLC.device), x_BLC)
