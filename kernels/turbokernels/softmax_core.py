"""Softmax attention of many small independent problems: the formulas that the dense and the sparse references share.

Each function takes groups of rows with all the keys they attend to, in float32 or float64, and is a plain transcription
of method.md section 4, "JVP through attention". The caller decides what a group is (a head's chunk of query rows, or
one query block with its kept key blocks) and how many fit in memory at once.

Shape suffixes: G groups, Q query rows, K keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the largest temporary that the references build at once. On a GPU (128 MiB in float32) it bounds memory at
# L = 32,760; on a CPU (2 MiB) it keeps temporaries in the cache, which measured 20% faster than one piece at B16 L256
# N4 D32.
CHUNK_ELEMENTS = {"cpu": 2**19}
CHUNK_ELEMENTS_DEFAULT = 2**25


def chunk_size(elements_per_row: int, device: torch.device) -> int:
    """Rows (or groups) per chunk, at least 1, so that one temporary stays within the device's budget."""
    return max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_DEFAULT) // elements_per_row)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: float64 for float64, float32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


def probabilities(q_GQD: Tensor, k_GKD: Tensor, valid_G1K: Tensor | None = None) -> Tensor:
    """P = softmax(Q K^T) with q already scaled by 1 / sqrt(D); keys that are not valid get probability 0. (G, Q, K)."""
    s_GQK = torch.bmm(q_GQD, k_GKD.mT)
    if valid_G1K is not None:
        s_GQK.masked_fill_(~valid_G1K, float("-inf"))
    return torch.softmax(s_GQK, -1)


def output_tangent(
    p_GQK: Tensor,
    q_GQD: Tensor,
    k_GKD: Tensor,
    v_GKD: Tensor,
    o_GQD: Tensor,
    tq_GQD: Tensor | None,
    tk_GKD: Tensor | None,
    tv_GKD: Tensor | None,
) -> Tensor:
    """dO = P dV + (P * dS) V - rowsum(P * dS) O with dS = dQ K^T + Q dK^T; q and tq are already scaled. (G, Q, D).

    A tangent that is None is zero, and its product is not computed.
    """
    to_GQD = torch.zeros_like(o_GQD) if tv_GKD is None else torch.bmm(p_GQK, tv_GKD)
    if tq_GQD is None and tk_GKD is None:
        return to_GQD
    w_GQK = torch.zeros_like(p_GQK) if tq_GQD is None else torch.bmm(tq_GQD, k_GKD.mT)
    if tk_GKD is not None:
        w_GQK.baddbmm_(q_GQD, tk_GKD.mT)
    w_GQK.mul_(p_GQK)
    return to_GQD.baddbmm_(w_GQK, v_GKD).sub_(w_GQK.sum(-1, keepdim=True) * o_GQD)


def gradients(
    p_GQK: Tensor, q_GQD: Tensor, k_GKD: Tensor, v_GKD: Tensor, do_GQD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(dO * O) with respect to the scaled q, k and v: ((G, Q, D), (G, K, D), (G, K, D)).

    dV = P^T dO; dS = P * (dO V^T - rowsum(P * dO V^T)); dQ = dS K; dK = dS^T Q.
    """
    dv_GKD = torch.bmm(p_GQK.mT, do_GQD)
    ds_GQK = torch._softmax_backward_data(torch.bmm(do_GQD, v_GKD.mT), p_GQK, -1, p_GQK.dtype)
    return torch.bmm(ds_GQK, k_GKD), torch.bmm(ds_GQK.mT, q_GQD), dv_GKD
