# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""Triton kernel of gated residual, LayerNorm + modulation and quantisation: any chain of them in one pass.

Each program holds one token: the residual stream and the branch are read once, results are written once. Modulation
vectors are shared by the tokens of a sample and stay in the first-level cache.
Shape suffixes: B batch, L tokens, C channels; S is 1 or L.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbokernels.fused_norm_modulate import reference
from turbokernels.recompute import differentiable, refuse_tangents
from turbokernels.rows import (
    check_row_kernel,
    load_piece,
    load_row,
    row_launches,
    row_sum,
    row_sum_of_squares,
    store_piece,
    store_quantized,
)
from turbokernels.tuning import Launch, best

# Features of a row in a thread, beside which the branch and the modulation still fit in registers.
PREFERRED = 40


@triton.jit(do_not_specialize=["length"])
def _residual_norm_kernel(
    p_x,
    p_y,
    p_gate,
    p_out,
    p_scale,
    p_shift,
    p_h,
    p_h_scale,
    length,
    eps,
    offset,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    stride_gate_b,
    stride_gate_l,
    stride_scale_b,
    stride_scale_l,
    stride_shift_b,
    stride_shift_l,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """out = x + y * gate, or x + y without p_gate (with p_y); h = norm(out) * (offset + scale) + shift (with p_h), in 8
    bits with p_h_scale.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_l = i_row // length, i_row % length
    row = load_row(p_x + i_b * stride_xb + i_l * stride_xl, WIDTH, CHUNK)
    if p_y is not None:
        branch = load_row(p_y + i_b * stride_yb + i_l * stride_yl, WIDTH, CHUNK)
        if p_gate is not None:
            p_gate += i_b * stride_gate_b + i_l * stride_gate_l
        stream = ()
        for i in tl.static_range(len(row)):
            b_branch = branch[i]
            if p_gate is not None:
                b_branch *= load_piece(p_gate, i, WIDTH, CHUNK)
            b_out = (row[i] + b_branch).to(p_out.dtype.element_ty)
            store_piece(p_out + i_row * WIDTH, b_out, i, WIDTH, CHUNK)
            stream = stream + (b_out.to(tl.float32),)  # noqa: RUF005 (what is normed is what is stored)
        row = stream
    if p_h is not None:
        mean = tl.div_rn(row_sum(row), WIDTH * 1.0)
        variance = tl.div_rn(row_sum_of_squares(row, mean, WIDTH, CHUNK), WIDTH * 1.0)
        inverse_deviation = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        p_scale += i_b * stride_scale_b + i_l * stride_scale_l
        p_shift += i_b * stride_shift_b + i_l * stride_shift_l
        normed = ()
        for i in tl.static_range(len(row)):
            b_gain = offset + load_piece(p_scale, i, WIDTH, CHUNK)
            b_h = (row[i] - mean) * inverse_deviation * b_gain + load_piece(p_shift, i, WIDTH, CHUNK)
            if p_h_scale is None:
                store_piece(p_h + i_row * WIDTH, b_h, i, WIDTH, CHUNK)
            else:
                if (i + 1) * CHUNK > WIDTH:  # lanes beyond the row must not set its scale
                    b_h = tl.where(i * CHUNK + tl.arange(0, CHUNK) < WIDTH, b_h, 0.0)
                normed = normed + (b_h,)  # noqa: RUF005
        if p_h_scale is not None:
            store_quantized(p_h + i_row * WIDTH, p_h_scale + i_row, normed, WIDTH, CHUNK)


def _strides(x_BSC: Tensor | None) -> tuple[int, int]:
    """Of samples and tokens; 0 where a dimension is shared or absent."""
    if x_BSC is None:
        return (0, 0)
    return (x_BSC.stride(0) if x_BSC.shape[0] > 1 else 0, x_BSC.stride(1) if x_BSC.shape[1] > 1 else 0)


def _results(x: Tensor, y: Tensor | None, normed: bool, quantized: torch.dtype | None) -> list[Tensor]:
    """Unwritten results: out (with y), then h (its dtype is the branch's, or x's), or 8-bit values and scales."""
    results = [] if y is None else [torch.empty(x.shape, dtype=x.dtype, device=x.device)]
    if normed:
        dtype = quantized or (x if y is None else y).dtype
        results.append(torch.empty(x.shape, dtype=dtype, device=x.device))
    if quantized is not None:
        results.append(torch.empty(x.shape[:2], dtype=torch.float32, device=x.device))
    return results


@torch.library.custom_op("turbokernels::residual_norm", mutates_args=())
def residual_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    quantized: torch.dtype | None,
    affine: bool = False,
) -> list[Tensor]:
    """[x + y * gate] (with y; gate None is 1), then [h] or [8-bit h, its scales] (with scale and shift)."""
    batch, length, width = x.shape
    results = _results(x, y, scale is not None, quantized)
    out = None if y is None else results[0]
    h = None if scale is None else results[0 if y is None else 1]
    h_scale = None if quantized is None else results[-1]

    def run(launch: Launch) -> None:
        _residual_norm_kernel[(batch * length,)](
            x,
            y,
            gate,
            out,
            scale,
            shift,
            h,
            h_scale,
            length,
            eps,
            0.0 if affine else 1.0,
            *(stride for operand in (x, y, gate, scale, shift) for stride in _strides(operand)),
            WIDTH=width,
            **launch.kwargs(),
        )

    key = (width, x.dtype, y is not None, scale is not None, quantized)
    run(best("residual_norm", key, row_launches(width, PREFERRED), run, x.device))
    return results


@residual_norm.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    quantized: torch.dtype | None,
    affine: bool = False,
) -> list[Tensor]:
    return _results(x, y, scale is not None, quantized)


def check(op: str, quantized: torch.dtype | None, x: Tensor, *others: Tensor) -> None:
    """Require operands that the kernel takes."""
    check_row_kernel(op, x, x.shape[-1], quantized)
    for operand in others:
        check_row_kernel(op, operand, 1)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float, affine: bool = False) -> Tensor:
    """As reference.layer_norm_modulate."""
    op = "layer_norm_modulate"
    check(op, None, x, scale, shift)

    def fused(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return residual_norm(x, None, None, scale, shift, eps, None, affine)[0]

    of_reference = partial(reference.layer_norm_modulate, eps=eps, affine=affine)
    return differentiable(op, fused, of_reference, x, scale, shift)


def layer_norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, affine: bool = False
) -> tuple[Tensor, Tensor]:
    """As reference.layer_norm_modulate_quantize."""
    op = "layer_norm_modulate_quantize"
    check(op, dtype, x, scale, shift)
    refuse_tangents(op, x, scale, shift)
    values, token_scale = residual_norm(x, None, None, scale, shift, eps, dtype, affine)
    return values, token_scale
