"""Public entries of block-sparse attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from turbokernels import dispatch
from turbokernels.attention_sparse import reference
from turbokernels.blocks import BlockMask
from turbokernels.checks import check_attention


def _triton(*operands: Any) -> Tensor:
    from turbokernels.attention_sparse import kernel  # here, so that the library imports without Triton

    return kernel.sparse_attention(*operands)


def _triton_jvp(*operands: Any) -> tuple[Tensor, Tensor]:
    from turbokernels.attention_sparse import kernel

    return kernel.sparse_attention_jvp(*operands)


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.sparse_attention}
JVP_IMPLEMENTATIONS = {"triton": _triton_jvp, "reference": reference.sparse_attention_jvp}


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, impl: str = "auto") -> Tensor:
    """Softmax attention of each query block over its kept key blocks, scale 1 / sqrt(D); differentiable once.

    q: (B, Lq, N, D), k, v: (B, Lk, N, D), one floating dtype, any strides with a contiguous last dimension. Returns o
    (B, Lq, N, D) in their dtype; arithmetic is float32 (float64 for float64). NaN propagates.
    Errors: ValueError when shapes, dtypes, devices, strides or the mask do not fit.
    Source: SLA, arXiv 2509.24006; method.md section 3, step 4.
    """
    check_attention("sparse_attention", q, k, v)
    mask.check_operands("sparse_attention", q, k)
    return dispatch.choose("sparse_attention", impl, q.device, IMPLEMENTATIONS)(q, k, v, mask)


def sparse_attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, mask: BlockMask, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`sparse_attention` and its tangent along (tq, tk, tv), each like its primal: (o, to), both (B, Lq, N, D).

    o carries the gradient of `sparse_attention` with respect to q, k and v; to carries none, nor do the tangents.
    Errors: as `sparse_attention`.
    Source: method.md section 4, "JVP through attention", restricted to the kept blocks.
    """
    check_attention("sparse_attention_jvp", q, k, v, tq=tq, tk=tk, tv=tv)
    mask.check_operands("sparse_attention_jvp", q, k)
    run = dispatch.choose("sparse_attention_jvp", impl, q.device, JVP_IMPLEMENTATIONS)
    return run(q, k, v, tq, tk, tv, mask)
