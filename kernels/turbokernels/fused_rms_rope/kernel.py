# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""Triton kernel of RMSNorm over all heads, then rotary embedding: a token is read once and written once.

Shape suffixes: B batch, L tokens, N heads, D head dim, H half of the head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbokernels.fused_rms_rope import reference
from turbokernels.recompute import differentiable
from turbokernels.rows import (
    check_row_kernel,
    load_piece,
    load_row,
    row_launches,
    row_sum_of_squares,
    store_piece,
)
from turbokernels.tuning import Launch, best


@triton.jit
def _load_heads(p_token, stride_head, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """As load_row, of heads that do not follow one another in memory."""
    row = ()
    for start in tl.static_range(0, WIDTH, CHUNK):
        i_c = start + tl.arange(0, CHUNK)
        b_x = tl.load(p_token + i_c // HEAD_DIM * stride_head + i_c % HEAD_DIM, mask=i_c < WIDTH, other=0.0)
        row = row + (b_x.to(tl.float32),)  # noqa: RUF005 (Triton has no starred tuples)
    return row


@triton.jit(do_not_specialize=["length"])
def _rms_rope_kernel(
    p_x,
    p_weight,
    p_cos,
    p_sin,
    p_out,
    length,
    eps,
    stride_xb,
    stride_xl,
    stride_xn,
    stride_out_b,
    stride_out_l,
    stride_cos,
    stride_sin,
    PACKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One token: all its heads normed together, then (with p_cos) every pair of neighbours turned by its angle.

    The token is read as a whole before any of it is written, so p_out may be p_x.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_l = i_row // length, i_row % length
    p_token = p_x + i_b * stride_xb + i_l * stride_xl
    if PACKED:
        row = load_row(p_token, WIDTH, CHUNK)
    else:
        row = _load_heads(p_token, stride_xn, HEAD_DIM, WIDTH, CHUNK)
    mean_square = tl.div_rn(row_sum_of_squares(row, 0.0, WIDTH, CHUNK), WIDTH * 1.0)
    inverse_rms = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    i_pair = tl.arange(0, CHUNK // 2)
    p_out += i_b * stride_out_b + i_l * stride_out_l
    for i in tl.static_range(len(row)):
        b_x = row[i] * inverse_rms * load_piece(p_weight, i, WIDTH, CHUNK)
        if p_cos is not None:
            b_real, b_imag = tl.split(tl.reshape(b_x, (CHUNK // 2, 2)))  # [CHUNK / 2]
            # The angles repeat in every head.
            i_h = (i * (CHUNK // 2) + i_pair) % (HEAD_DIM // 2)
            b_cos = tl.load(p_cos + i_l * stride_cos + i_h).to(tl.float32)
            b_sin = tl.load(p_sin + i_l * stride_sin + i_h).to(tl.float32)
            b_turned = tl.join(b_real * b_cos - b_imag * b_sin, b_real * b_sin + b_imag * b_cos)  # [CHUNK / 2, 2]
            b_x = tl.reshape(b_turned, (CHUNK,))
        store_piece(p_out, b_x, i, WIDTH, CHUNK)


def _has_packed_heads(x_BLND: Tensor) -> bool:
    return x_BLND.shape[2] == 1 or x_BLND.stride(2) == x_BLND.shape[3]


def _run(
    x_BLND: Tensor,
    weight_ND: Tensor,
    cos_LH: Tensor | None,
    sin_LH: Tensor | None,
    eps: float,
    out_BLND: Tensor,
    launch: Launch,
) -> None:
    """Into out_BLND, whose heads are packed."""
    batch, length, heads, head_dim = x_BLND.shape
    _rms_rope_kernel[(batch * length,)](
        x_BLND,
        weight_ND,
        cos_LH,
        sin_LH,
        out_BLND,
        length,
        eps,
        *x_BLND.stride()[:3],
        *out_BLND.stride()[:2],
        0 if cos_LH is None else cos_LH.stride(0),
        0 if sin_LH is None else sin_LH.stride(0),
        PACKED=_has_packed_heads(x_BLND),
        HEAD_DIM=head_dim,
        WIDTH=heads * head_dim,
        **launch.kwargs(),
    )


def _launch(x_BLND: Tensor, run: Callable[[Launch], None]) -> Launch:
    heads, head_dim = x_BLND.shape[2:]
    return best("rms_norm_rope", (heads, head_dim, x_BLND.dtype), row_launches(heads * head_dim), run, x_BLND.device)


@torch.library.custom_op("turbokernels::rms_norm_rope", mutates_args=())
def _rms_norm_rope(
    x_BLND: Tensor, weight_ND: Tensor, cos_LH: Tensor | None, sin_LH: Tensor | None, eps: float
) -> Tensor:
    out_BLND = torch.empty(x_BLND.shape, dtype=x_BLND.dtype, device=x_BLND.device)
    if out_BLND.numel():
        run = partial(_run, x_BLND, weight_ND, cos_LH, sin_LH, eps, out_BLND)
        run(_launch(x_BLND, run))
    return out_BLND


@torch.library.custom_op("turbokernels::rms_norm_rope_", mutates_args=("x_BLND",))
def _rms_norm_rope_(
    x_BLND: Tensor, weight_ND: Tensor, cos_LH: Tensor | None, sin_LH: Tensor | None, eps: float
) -> None:
    if x_BLND.numel():

        def run_apart(
            launch: Launch,
        ) -> None:  # launches are tried and timed more than once: x must be overwritten once
            apart = torch.empty_like(x_BLND, memory_format=torch.contiguous_format)
            _run(x_BLND, weight_ND, cos_LH, sin_LH, eps, apart, launch)

        _run(x_BLND, weight_ND, cos_LH, sin_LH, eps, x_BLND, _launch(x_BLND, run_apart))


@_rms_norm_rope.register_fake
def _(x_BLND: Tensor, weight_ND: Tensor, cos_LH: Tensor | None, sin_LH: Tensor | None, eps: float) -> Tensor:
    return torch.empty(x_BLND.shape, dtype=x_BLND.dtype, device=x_BLND.device)


def _check(x: Tensor, *others: Tensor) -> None:
    check_row_kernel("rms_norm_rope", x, x.shape[2] * x.shape[3])
    for operand in others:
        check_row_kernel("rms_norm_rope", operand, 1)


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """As reference.rms_norm_rope."""
    op = "rms_norm_rope"
    angles = () if cos is None or sin is None else (cos, sin)
    _check(x, weight, *angles)

    def fused(x: Tensor, weight: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        return _rms_norm_rope(x, weight, cos, sin, eps)

    def of_reference(x: Tensor, weight: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        return reference.rms_norm_rope(x, weight, cos, sin, eps)

    return differentiable(op, fused, of_reference, x, weight, *angles)


def rms_norm_rope_(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """As reference.rms_norm_rope, into x. Errors: ValueError for heads of x that do not follow one another in memory."""
    _check(x, weight, *(() if cos is None or sin is None else (cos, sin)))
    if not _has_packed_heads(x):
        raise ValueError(
            f"rms_norm_rope: x {tuple(x.shape)} has strides {x.stride()}; in place its heads must follow one another in "
            "memory: leave in_place out"
        )
    _rms_norm_rope_(x, weight, cos, sin, eps)
    return x
