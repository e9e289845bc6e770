"""Public entry of dense attention with its tangent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from turbokernels import dispatch
from turbokernels.attention_dense import reference
from turbokernels.checks import check_attention


def _triton(*operands: Any) -> tuple[Tensor, Tensor]:
    from turbokernels.attention_dense import kernel  # here, so that the library imports without Triton

    return kernel.attention_jvp(*operands)


IMPLEMENTATIONS = {"triton": _triton, "reference": reference.attention_jvp}


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dense softmax attention, scale 1 / sqrt(D), and its tangent along (tq, tk, tv): (o, to), both (B, Lq, N, D).

    q, tq: (B, Lq, N, D); k, v, tk, tv: (B, Lk, N, D); Lq and Lk may differ; one floating dtype, any strides with a
    contiguous last dimension. A tangent that is None is zero (the keys of a constant context): its products are not
    computed. o carries the gradient of attention with respect to q, k and v; to carries none, nor do the tangents.
    Errors: ValueError when shapes, dtypes, devices or strides do not fit.
    Source: method.md section 4, "JVP through attention".
    """
    check_attention("attention_jvp", q, k, v, tq=tq, tk=tk, tv=tv)
    return dispatch.choose("attention_jvp", impl, q.device, IMPLEMENTATIONS)(q, k, v, tq, tk, tv)
