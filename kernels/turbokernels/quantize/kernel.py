"""Triton kernels of 8-bit quantisation: one pass over the input, and the reference's integers bit for bit.

Shape suffixes: B samples, L tokens (rows), K features, T tiles along L, U tiles along K.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbokernels.rows import (
    as_samples,
    check_row_kernel,
    gelu_tanh,
    load_piece,
    load_row,
    quotient,
    row_launches,
    safe_scale,
    store_quantized,
    to_8_bits,
)
from turbokernels.tuning import Launch, best


@triton.jit(do_not_specialize=["length"])
def _rows_kernel(
    p_x,
    p_q,
    p_scale,
    p_smooth,
    length,
    stride_xb,
    stride_xl,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    GELU: tl.constexpr,
):
    """One row: (optionally GELU, divided by p_smooth) to 8 bits."""
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_l = i_row // length, i_row % length
    row = load_row(p_x + i_b * stride_xb + i_l * stride_xl, WIDTH, CHUNK)
    if GELU:
        activated = ()
        for i in tl.static_range(len(row)):
            activated = activated + (gelu_tanh(row[i]),)  # noqa: RUF005
        row = activated
    if p_smooth is not None:
        divided = ()
        for i in tl.static_range(len(row)):
            b_smooth = load_piece(p_smooth, i, WIDTH, CHUNK, OTHER=1.0)
            divided = divided + (row[i] / b_smooth,)  # noqa: RUF005
        row = divided
    store_quantized(p_q + i_row * WIDTH, p_scale + i_row, row, WIDTH, CHUNK)


@triton.jit(do_not_specialize=["length"])
def _tiles_kernel(
    p_x,
    p_q,
    p_scale,
    p_smooth,
    length,
    width,
    stride_xb,
    stride_xl,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
):
    """One BLOCK x BLOCK tile of one sample: (optionally GELU, divided by p_smooth) to 8 bits."""
    n_t, n_u = tl.cdiv(length, BLOCK), tl.cdiv(width, BLOCK)
    i_tile = tl.program_id(0)
    i_b, i_t, i_u = (i_tile // (n_t * n_u)).to(tl.int64), i_tile // n_u % n_t, i_tile % n_u
    i_l = (i_t * BLOCK + tl.arange(0, BLOCK))[:, None].to(tl.int64)
    i_k = i_u * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_tile = (i_l < length) & (i_k < width)
    b_x = tl.load(p_x + i_b * stride_xb + i_l * stride_xl + i_k, mask=m_tile, other=0.0).to(
        tl.float32
    )  # [BLOCK, BLOCK]
    if GELU:
        b_x = gelu_tanh(b_x)
    if p_smooth is not None:
        b_x = b_x / tl.load(p_smooth + i_k, mask=i_k < width, other=1.0)
    # As in row_amax: integer maxima of the bits propagate NaN.
    bits = tl.max(tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0)
    scale = safe_scale(bits.to(tl.float32, bitcast=True), 128.0)
    # +amax becomes 128, which int8 does not hold.
    b_q = to_8_bits(tl.minimum(quotient(b_x, scale, tl.div_rn(1.0, scale)), 127.0), tl.int8)
    tl.store(p_q + (i_b * length + i_l) * width + i_k, b_q, mask=m_tile)
    tl.store(p_scale + i_tile, scale)


@torch.library.custom_op("turbokernels::quantize_rows", mutates_args=())
def _quantize_rows(
    x: Tensor, smooth: Tensor | None, dtype: torch.dtype, activation: str | None
) -> tuple[Tensor, Tensor]:
    x_BLK = as_samples(x)
    _, length, width = x_BLK.shape
    values, scale = torch.empty(x.shape, dtype=dtype, device=x.device), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if not scale.numel():
        return values, scale

    def run(launch: Launch) -> None:
        _rows_kernel[(scale.numel(),)](
            x_BLK,
            values,
            scale,
            smooth,
            length,
            x_BLK.stride(0),
            x_BLK.stride(1),
            WIDTH=width,
            GELU=activation == "gelu_tanh",
            **launch.kwargs(),
        )

    key = (width, x.dtype, dtype, activation, smooth is not None)
    run(best("quantize_rows", key, row_launches(width), run, x.device))
    return values, scale


@_quantize_rows.register_fake
def _(x: Tensor, smooth: Tensor | None, dtype: torch.dtype, activation: str | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format), x.new_empty(
        x.shape[:-1], dtype=torch.float32
    )


@torch.library.custom_op("turbokernels::quantize_block", mutates_args=())
def _quantize_block(x: Tensor, smooth: Tensor | None, block: int, activation: str | None) -> tuple[Tensor, Tensor]:
    x_BLK = as_samples(x)
    n_samples, length, width = x_BLK.shape
    n_t, n_u = triton.cdiv(length, block), triton.cdiv(width, block)
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = x.new_empty((*x.shape[:-2], n_t, n_u), dtype=torch.float32)
    if not scale.numel():
        return values, scale

    def run(launch: Launch) -> None:
        _tiles_kernel[(n_samples * n_t * n_u,)](
            x_BLK,
            values,
            scale,
            smooth,
            length,
            width,
            x_BLK.stride(0),
            x_BLK.stride(1),
            BLOCK=block,
            GELU=activation == "gelu_tanh",
            **launch.kwargs(),
        )

    candidates = [Launch(num_warps, 1) for num_warps in ((8, 4, 16) if block > 64 else (4, 2))]
    run(best("quantize_block", (block, x.dtype), candidates, run, x.device))
    return values, scale


@_quantize_block.register_fake
def _(x: Tensor, smooth: Tensor | None, block: int, activation: str | None) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-2], -(-x.shape[-2] // block), -(-x.shape[-1] // block))
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format), x.new_empty(
        shape, dtype=torch.float32
    )


def quantize_rows(
    x: Tensor, dtype: torch.dtype, activation: str | None = None, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As reference.quantize_rows."""
    check_row_kernel("quantize", x, x.shape[-1], dtype)
    return _quantize_rows(x.detach(), smooth, dtype, activation)


def quantize_block(
    x: Tensor, block: int, activation: str | None = None, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As reference.quantize_block."""
    check_row_kernel("quantize_block", x, 1)
    if block & (block - 1) or not 16 <= block <= 128:
        raise ValueError(
            f"quantize_block: the kernel has tiles of 16, 32, 64 and 128, not block={block}; use impl='reference'"
        )
    return _quantize_block(x.detach(), smooth, block, activation)
