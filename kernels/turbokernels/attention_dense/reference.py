"""Specification of dense attention with its tangent in plain PyTorch (method.md section 4, "JVP through attention").

Query rows go through in chunks against all keys, so that memory grows with the length and not with its square.

Shape suffixes: B batch, L tokens, N heads, D head dim; G the heads of all samples (B * N), R all query rows of a head,
Q the query rows of one chunk, K keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turbokernels.softmax_core import chunk_size, compute_dtype, gradients, output_tangent, probabilities


def _to_heads(x_BLND: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, N, D) to (B * N, L, D) in `dtype`."""
    return x_BLND.transpose(1, 2).flatten(0, 1).to(dtype)


def _from_heads(x_GRD: Tensor, like_BLND: Tensor) -> Tensor:
    """Inverse of `_to_heads` into the dtype of `like_BLND`, contiguous."""
    return x_GRD.unflatten(0, (like_BLND.shape[0], -1)).transpose(1, 2).to(like_BLND.dtype).contiguous()


def _chunks(q_GRD: Tensor, k_GKD: Tensor) -> list[slice]:
    """Slices of the query rows whose scores against all keys fit the memory budget."""
    length = q_GRD.shape[1]
    step = chunk_size(q_GRD.shape[0] * k_GKD.shape[1], q_GRD.device)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class _AttentionJvp(torch.autograd.Function):
    """(o, to): o is differentiable with respect to q, k, v; the tangent to is not."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q_BLND: Tensor,
        k_BLND: Tensor,
        v_BLND: Tensor,
        tq_BLND: Tensor | None,
        tk_BLND: Tensor | None,
        tv_BLND: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q_BLND, k_BLND, v_BLND)
        dtype = compute_dtype(q_BLND.dtype)
        scale = q_BLND.shape[3] ** -0.5
        q_GRD = _to_heads(q_BLND, dtype) * scale
        k_GKD, v_GKD = _to_heads(k_BLND, dtype), _to_heads(v_BLND, dtype)
        tq_GRD = None if tq_BLND is None else _to_heads(tq_BLND, dtype) * scale
        tk_GKD = None if tk_BLND is None else _to_heads(tk_BLND, dtype)
        tv_GKD = None if tv_BLND is None else _to_heads(tv_BLND, dtype)
        o_GRD, to_GRD = torch.empty_like(q_GRD), torch.empty_like(q_GRD)
        with torch.autocast(q_BLND.device.type, enabled=False):
            for rows in _chunks(q_GRD, k_GKD):
                q_GQD = q_GRD[:, rows]
                p_GQK = probabilities(q_GQD, k_GKD)
                o_GQD = torch.bmm(p_GQK, v_GKD)
                o_GRD[:, rows] = o_GQD
                tq_GQD = None if tq_GRD is None else tq_GRD[:, rows]
                to_GRD[:, rows] = output_tangent(p_GQK, q_GQD, k_GKD, v_GKD, o_GQD, tq_GQD, tk_GKD, tv_GKD)
        to_BLND = _from_heads(to_GRD, q_BLND)
        ctx.mark_non_differentiable(to_BLND)
        return _from_heads(o_GRD, q_BLND), to_BLND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BLND: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if do_BLND is None:
            return (None,) * 6
        q_BLND, k_BLND, v_BLND = ctx.saved_tensors
        dtype = compute_dtype(q_BLND.dtype)
        scale = q_BLND.shape[3] ** -0.5
        q_GRD, do_GRD = _to_heads(q_BLND, dtype) * scale, _to_heads(do_BLND, dtype)
        k_GKD, v_GKD = _to_heads(k_BLND, dtype), _to_heads(v_BLND, dtype)
        dq_GRD, dk_GKD, dv_GKD = torch.empty_like(q_GRD), torch.zeros_like(k_GKD), torch.zeros_like(v_GKD)
        with torch.autocast(q_BLND.device.type, enabled=False):
            for rows in _chunks(q_GRD, k_GKD):
                # The probabilities are computed again: keeping them would cost L^2 memory in every layer.
                q_GQD = q_GRD[:, rows]
                p_GQK = probabilities(q_GQD, k_GKD)
                dq_GQD, dk_rows_GKD, dv_rows_GKD = gradients(p_GQK, q_GQD, k_GKD, v_GKD, do_GRD[:, rows])
                dq_GRD[:, rows] = dq_GQD * scale
                dk_GKD += dk_rows_GKD
                dv_GKD += dv_rows_GKD
        grads = (_from_heads(dq_GRD, q_BLND), _from_heads(dk_GKD, k_BLND), _from_heads(dv_GKD, v_BLND))
        return (*grads, None, None, None)


def attention_jvp(
    q_BLND: Tensor,
    k_BLND: Tensor,
    v_BLND: Tensor,
    tq_BLND: Tensor | None,
    tk_BLND: Tensor | None,
    tv_BLND: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(o, to): dense attention, scale 1 / sqrt(D), and its directional derivative; a tangent that is None is zero."""
    return _AttentionJvp.apply(q_BLND, k_BLND, v_BLND, tq_BLND, tk_BLND, tv_BLND)  # pyright: ignore[reportReturnType]
