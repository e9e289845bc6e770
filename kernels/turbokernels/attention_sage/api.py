"""Public entries of quantised attention. Inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbokernels import dispatch
from turbokernels.attention_sage import reference
from turbokernels.blocks import BlockMask
from turbokernels.checks import check_attention

PV_FORMATS = ("auto", "fp8", "fp16")


def _triton(*operands: Any) -> Tensor:
    from turbokernels.attention_sage import launch  # here, so that the library imports without Triton

    return launch.sage_attention(*operands)


def _triton_sparse(*operands: Any) -> Tensor:
    from turbokernels.attention_sage import launch

    return launch.sage_sparse_attention(*operands)


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.sage_attention}
SPARSE_IMPLEMENTATIONS = {"triton": _triton_sparse, "reference": reference.sage_sparse_attention}


def resolve_pv(op: str, q: Tensor, k: Tensor, v: Tensor, pv: str) -> str:
    """Check what is particular to quantised attention and return the format of P V."""
    if pv not in PV_FORMATS:
        raise ValueError(f"{op}: pv={pv!r} is not known; use one of {', '.join(PV_FORMATS)}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            f"{op}: an operand requires a gradient, but quantised attention has none; "
            "call it under torch.no_grad(), or train with sparse_attention"
        )
    return reference.pv_format(q.device) if pv == "auto" else pv


def sage_attention(q: Tensor, k: Tensor, v: Tensor, pv: str = "auto", impl: str = "auto") -> Tensor:
    """Dense attention with q and smoothed k in int8 (a scale per 128 query and 64 key tokens) and P V in fp8 or fp16.

    q: (B, Lq, N, D), k, v: (B, Lk, N, D), one floating dtype, any strides with a contiguous last dimension. pv: "fp8"
    (e4m3, v with a scale per channel), "fp16", or "auto" (fp8 on sm89, sm90 and sm120). Returns o (B, Lq, N, D) in the
    operands' dtype.
    Errors: ValueError when operands do not fit or require a gradient.
    Source: SageAttention 2, arXiv 2411.10958; method.md section 7.
    """
    check_attention("sage_attention", q, k, v)
    pv = resolve_pv("sage_attention", q, k, v, pv)
    return dispatch.choose("sage_attention", impl, q.device, IMPLEMENTATIONS)(q, k, v, pv)


def sage_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, pv: str = "auto", impl: str = "auto"
) -> Tensor:
    """`sage_attention` restricted to the kept blocks of `mask`, with one scale per query block and per key block of it.

    Errors: as `sage_attention`, and ValueError when the mask is for other shapes.
    Source: SageSLA, method.md end of section 7.
    """
    check_attention("sage_sparse_attention", q, k, v)
    mask.check_operands("sage_sparse_attention", q, k)
    pv = resolve_pv("sage_sparse_attention", q, k, v, pv)
    return dispatch.choose("sage_sparse_attention", impl, q.device, SPARSE_IMPLEMENTATIONS)(q, k, v, mask, pv)
