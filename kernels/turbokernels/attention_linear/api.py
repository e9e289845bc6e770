"""Public entries of linear attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from turbokernels import dispatch
from turbokernels.attention_linear import reference
from turbokernels.checks import check_attention, check_floating

FEATURE_MAPS = ("softmax", "elu", "relu")


def _triton(name: str) -> Callable[..., Any]:
    """The kernels' function of that name, imported at its first call: the library imports without Triton."""

    def run(*operands: Any) -> Any:
        from turbokernels.attention_linear import launch

        return getattr(launch, name)(*operands)

    return run


IMPLEMENTATIONS = {"reference": reference.linear_attention, "triton": _triton("linear_attention")}
JVP_IMPLEMENTATIONS = {"reference": reference.linear_attention_jvp, "triton": _triton("linear_attention_jvp")}
ADD_IMPLEMENTATIONS = {"reference": reference.add_linear_attention, "triton": _triton("add_linear_attention")}
ADD_JVP_IMPLEMENTATIONS = {
    "reference": reference.add_linear_attention_jvp,
    "triton": _triton("add_linear_attention_jvp"),
}


def check_feature_map(op: str, feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"{op}: feature_map={feature_map!r} is not known; use one of {', '.join(FEATURE_MAPS)}")


def check_sum(op: str, q: Tensor, weight: Tensor, bias: Tensor | None, **bases: Tensor) -> None:
    """Check what is added to: `bases` like q; and P: weight (D, D), bias (D,) or None, of any floating dtype."""
    dim = q.shape[3]
    for name, base in bases.items():
        if base.shape != q.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(base.shape)}; expected q's shape {tuple(q.shape)}")
    check_floating(op, q=q, **bases)
    for name, tensor, shape in (("weight", weight, (dim, dim)), ("bias", bias, (dim,))):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}; expected floating {shape}")
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but q is on {q.device}; move them to one device")


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str = "softmax", impl: str = "auto") -> Tensor:
    """phi(q) (phi(k)^T v) / (phi(q) . sum_j phi(k_j) + 1e-5) over all keys; differentiable.

    q: (B, Lq, N, D), k, v: (B, Lk, N, D), one floating dtype, any strides with a contiguous last dimension.
    feature_map: "softmax" (over the head dim), "elu" (elu + 1) or "relu". Returns o (B, Lq, N, D) in their dtype;
    arithmetic is float32 (float64 for float64).
    Errors: ValueError when shapes, dtypes, devices, strides or the feature map do not fit.
    Source: SLA, arXiv 2509.24006; method.md section 3, step 5.
    """
    check_feature_map("linear_attention", feature_map)
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
    check_feature_map("linear_attention_jvp", feature_map)
    check_attention("linear_attention_jvp", q, k, v, tq=tq, tk=tk, tv=tv)
    run = dispatch.choose("linear_attention_jvp", impl, q.device, JVP_IMPLEMENTATIONS)
    return run(q, k, v, tq, tk, tv, feature_map)


def add_linear_attention(
    base: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feature_map: str = "softmax",
    impl: str = "auto",
) -> Tensor:
    """base + P(linear_attention(q, k, v)): SLA's sum of its two branches, base being the sparse one; differentiable.

    base: (B, Lq, N, D) like q; weight (D, D) and bias (D,) or None of P, floating, usually float32; the rest as in
    `linear_attention`. Returns o (B, Lq, N, D) in q's dtype: P's product and the sum are not rounded before.
    Errors: as `linear_attention`, and ValueError for a base, weight or bias that does not fit.
    Source: SLA, arXiv 2509.24006; method.md section 3, steps 5 and 6.
    """
    check_feature_map("add_linear_attention", feature_map)
    check_attention("add_linear_attention", q, k, v)
    check_sum("add_linear_attention", q, weight, bias, base=base)
    run = dispatch.choose("add_linear_attention", impl, q.device, ADD_IMPLEMENTATIONS)
    return run(base, q, k, v, weight, bias, feature_map)


def add_linear_attention_jvp(
    base: Tensor,
    tbase: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feature_map: str = "softmax",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`add_linear_attention` and its tangent along (tbase, tq, tk, tv), each like its primal: (o, to), both (B, Lq, N,
    D).

    o carries the gradient of `add_linear_attention`; to carries none. Errors: as `add_linear_attention`.
    """
    check_feature_map("add_linear_attention_jvp", feature_map)
    check_attention("add_linear_attention_jvp", q, k, v, tq=tq, tk=tk, tv=tv)
    check_sum("add_linear_attention_jvp", q, weight, bias, base=base, tbase=tbase)
    run = dispatch.choose("add_linear_attention_jvp", impl, q.device, ADD_JVP_IMPLEMENTATIONS)
    return run(base, tbase, q, k, v, tq, tk, tv, weight, bias, feature_map)
