"""Specification of linear attention and its tangent in plain PyTorch (SLA, arXiv 2509.24006; method.md section 3, step
5).

Differentiable by autograd: two products of D x D per head are as fast as a kernel could be.

Shape suffixes: B batch, N heads, L tokens (Q queries, K keys), D head dim, E value dim (= D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokernels.softmax_core import compute_dtype

EPS = 1e-5


def features(x_BNLD: Tensor, feature_map: str) -> Tensor:
    """phi(x) >= 0: softmax over the head dim, elu + 1, or relu."""
    if feature_map == "softmax":
        return torch.softmax(x_BNLD, -1)
    if feature_map == "elu":
        return torch.nn.functional.elu(x_BNLD) + 1.0
    return torch.relu(x_BNLD)


def features_tangent(phi_BNLD: Tensor, tx_BNLD: Tensor, feature_map: str) -> Tensor:
    """Tangent of phi along tx, from phi itself: each map's derivative is a function of its value."""
    if feature_map == "softmax":
        scaled_BNLD = phi_BNLD * tx_BNLD
        return scaled_BNLD - phi_BNLD * scaled_BNLD.sum(-1, keepdim=True)
    if feature_map == "elu":
        return phi_BNLD.clamp(max=1.0) * tx_BNLD  # elu' = exp(x) = phi below 0, and 1 above, where phi > 1
    return tx_BNLD.masked_fill(phi_BNLD == 0.0, 0.0)


def _heads_first(x_BLND: Tensor) -> Tensor:
    """(B, L, N, D) to (B, N, L, D), in the dtype of the arithmetic."""
    return x_BLND.to(compute_dtype(x_BLND.dtype)).transpose(1, 2)


def _tokens_first(x_BNLD: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N, L, D) to contiguous (B, L, N, D) in `dtype`."""
    return x_BNLD.transpose(1, 2).to(dtype).contiguous()


def linear_attention(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, feature_map: str) -> Tensor:
    """o = phi(q) (phi(k)^T v) / (phi(q) . sum_j phi(k_j) + 1e-5), (B, Lq, N, D)."""
    with torch.autocast(q_BLND.device.type, enabled=False):
        phi_q_BNQD = features(_heads_first(q_BLND), feature_map)
        phi_k_BNKD = features(_heads_first(k_BLND), feature_map)
        kv_BNDE = phi_k_BNKD.mT @ _heads_first(v_BLND)
        z_BND1 = phi_k_BNKD.sum(2).unsqueeze(-1)
        # Times the reciprocal: the backward of a division by a broadcast tensor costs four passes over it, this two.
        o_BNQE = (phi_q_BNQD @ kv_BNDE) * (phi_q_BNQD @ z_BND1 + EPS).reciprocal()
    return _tokens_first(o_BNQE, q_BLND.dtype)


def linear_attention_jvp(
    q_BLND: Tensor,
    k_BLND: Tensor,
    v_BLND: Tensor,
    tq_BLND: Tensor,
    tk_BLND: Tensor,
    tv_BLND: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """(o, to): `linear_attention` and its directional derivative by the product and quotient rules."""
    with torch.autocast(q_BLND.device.type, enabled=False):
        v_BNKE = _heads_first(v_BLND)
        phi_q_BNQD = features(_heads_first(q_BLND), feature_map)
        phi_k_BNKD = features(_heads_first(k_BLND), feature_map)
        kv_BNDE = phi_k_BNKD.mT @ v_BNKE
        z_BND1 = phi_k_BNKD.sum(2).unsqueeze(-1)
        # In the order of `linear_attention`: a checkpointed pass with tangents is computed again without them, and both must
        # save the same tensors.
        numerator_BNQE = phi_q_BNQD @ kv_BNDE
        inverse_BNQ1 = (phi_q_BNQD @ z_BND1 + EPS).reciprocal()
        o_BNQE = numerator_BNQE * inverse_BNQ1

        with torch.no_grad():  # reads the primal's values; adds nothing to its graph
            t_phi_q_BNQD = features_tangent(phi_q_BNQD, _heads_first(tq_BLND), feature_map)
            t_phi_k_BNKD = features_tangent(phi_k_BNKD, _heads_first(tk_BLND), feature_map)
            t_kv_BNDE = t_phi_k_BNKD.mT @ v_BNKE + phi_k_BNKD.mT @ _heads_first(tv_BLND)
            t_z_BND1 = t_phi_k_BNKD.sum(2).unsqueeze(-1)
            t_numerator_BNQE = t_phi_q_BNQD @ kv_BNDE + phi_q_BNQD @ t_kv_BNDE
            t_denominator_BNQ1 = t_phi_q_BNQD @ z_BND1 + phi_q_BNQD @ t_z_BND1
            to_BNQE = (t_numerator_BNQE - o_BNQE * t_denominator_BNQ1) * inverse_BNQ1
    return _tokens_first(o_BNQE, q_BLND.dtype), _tokens_first(to_BNQE, q_BLND.dtype)


def add_linear_attention(
    base_BLND: Tensor,
    q_BLND: Tensor,
    k_BLND: Tensor,
    v_BLND: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    feature_map: str,
) -> Tensor:
    """base + P(linear attention), P the linear map of `weight` and `bias`; rounded once, at the end."""
    dtype = compute_dtype(q_BLND.dtype)
    o_BLND = linear_attention(q_BLND.to(dtype), k_BLND.to(dtype), v_BLND.to(dtype), feature_map)
    with torch.autocast(q_BLND.device.type, enabled=False):
        return (base_BLND.to(dtype) + _project(o_BLND, weight_ED, bias_E)).to(q_BLND.dtype)


def add_linear_attention_jvp(
    base_BLND: Tensor,
    tbase_BLND: Tensor,
    q_BLND: Tensor,
    k_BLND: Tensor,
    v_BLND: Tensor,
    tq_BLND: Tensor,
    tk_BLND: Tensor,
    tv_BLND: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """(o, to): `add_linear_attention` and its tangent; P has none."""
    dtype = compute_dtype(q_BLND.dtype)
    primals = (q_BLND.to(dtype), k_BLND.to(dtype), v_BLND.to(dtype))
    o_BLND, to_BLND = linear_attention_jvp(
        *primals, tq_BLND.to(dtype), tk_BLND.to(dtype), tv_BLND.to(dtype), feature_map
    )
    with torch.autocast(q_BLND.device.type, enabled=False):
        o_BLND = base_BLND.to(dtype) + _project(o_BLND, weight_ED, bias_E)
        with torch.no_grad():
            to_BLND = tbase_BLND.to(dtype) + _project(to_BLND, weight_ED, None)
    return o_BLND.to(q_BLND.dtype), to_BLND.to(q_BLND.dtype)


def _project(x_BLND: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """P(x) in x's dtype."""
    dtype = x_BLND.dtype
    return torch.nn.functional.linear(x_BLND, weight_ED.to(dtype), None if bias_E is None else bias_E.to(dtype))
