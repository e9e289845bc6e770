"""Public entries of linear attention."""

from __future__ import annotations

from torch import Tensor

from turbokernels import dispatch
from turbokernels.attention_linear import reference
from turbokernels.checks import check_attention

FEATURE_MAPS = ("softmax", "elu", "relu")
IMPLEMENTATIONS = {"reference": reference.linear_attention}
JVP_IMPLEMENTATIONS = {"reference": reference.linear_attention_jvp}


def _check_feature_map(op: str, feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"{op}: feature_map={feature_map!r} is not known; use one of {', '.join(FEATURE_MAPS)}")


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str = "softmax", impl: str = "auto") -> Tensor:
    """phi(q) (phi(k)^T v) / (phi(q) . sum_j phi(k_j) + 1e-5) over all keys; differentiable.

    q: (B, Lq, N, D), k, v: (B, Lk, N, D), one floating dtype, any strides with a contiguous last dimension.
    feature_map: "softmax" (over the head dim), "elu" (elu + 1) or "relu". Returns o (B, Lq, N, D) in their dtype;
    arithmetic is float32 (float64 for float64).
    Errors: ValueError when shapes, dtypes, devices, strides or the feature map do not fit.
    Source: SLA, arXiv 2509.24006; method.md section 3, step 5.
    """
    _check_feature_map("linear_attention", feature_map)
    check_attention("linear_attention", q, k, v)
    return dispatch.choose("linear_attention", impl, q.device, IMPLEMENTATIONS)(q, k, v, feature_map)


def linear_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    feature_map: str = "softmax",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`linear_attention` and its tangent along (tq, tk, tv), each like its primal: (o, to), both (B, Lq, N, D).

    o carries the gradient of `linear_attention`; to carries none. Errors: as `linear_attention`.
    Source: the product and quotient rules on method.md section 3, step 5.
    """
    _check_feature_map("linear_attention_jvp", feature_map)
    check_attention("linear_attention_jvp", q, k, v, tq=tq, tk=tk, tv=tv)
    run = dispatch.choose("linear_attention_jvp", impl, q.device, JVP_IMPLEMENTATIONS)
    return run(q, k, v, tq, tk, tv, feature_map)
