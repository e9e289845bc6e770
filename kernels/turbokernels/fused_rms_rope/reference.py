"""Specification of RMSNorm + RoPE in plain PyTorch (Wan, arXiv 2503.20314).

Shape suffixes: B batch, L tokens, N heads, D head dim, H half of the head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokernels.softmax_core import compute_dtype


def rms_norm_rope(
    x_BLND: Tensor, weight_ND: Tensor, cos_LH: Tensor | None, sin_LH: Tensor | None, eps: float
) -> Tensor:
    """y = rotate(x / sqrt(mean over N, D of x^2 + eps) * weight): neighbours (2h, 2h + 1) turn by angle (l, h), if
    any.
    """
    dtype = compute_dtype(x_BLND.dtype)
    wide_BLC = x_BLND.to(dtype).flatten(2)
    normed_BLC = torch.nn.functional.rms_norm(wide_BLC, wide_BLC.shape[-1:], weight_ND.to(dtype), eps)
    if cos_LH is None or sin_LH is None:
        return normed_BLC.to(x_BLND.dtype).view(x_BLND.shape)
    turn_LH = torch.complex(cos_LH.to(dtype), sin_LH.to(dtype))
    pairs_BLNH = torch.view_as_complex(normed_BLC.unflatten(-1, (x_BLND.shape[2], -1, 2)))
    return torch.view_as_real(pairs_BLNH * turn_LH[:, None]).flatten(-2).to(x_BLND.dtype)
