"""Specification of RMSNorm + RoPE in plain PyTorch (Wan, arXiv 2503.20314).

Shape suffixes: B batch, L tokens, N heads, D head dim, H half of the head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokernels.softmax_core import compute_dtype


def rms_norm_rope(x_BLND: Tensor, weight_ND: Tensor, cos_LH: Tensor, sin_LH: Tensor, eps: float) -> Tensor:
    """y = rotate(x / sqrt(mean over N, D of x^2 + eps) * weight): neighbours (2h, 2h + 1) turn by angle (l, h)."""
    dtype = compute_dtype(x_BLND.dtype)
    wide_BLND = x_BLND.to(dtype)
    inverse_rms_BL11 = torch.rsqrt(wide_BLND.square().mean((2, 3), keepdim=True) + eps)
    normed_BLND = wide_BLND * inverse_rms_BL11 * weight_ND.to(dtype).view(x_BLND.shape[2:])
    real_BLNH, imag_BLNH = normed_BLND.unflatten(-1, (-1, 2)).unbind(-1)
    cos_L1H, sin_L1H = cos_LH.to(dtype).unsqueeze(1), sin_LH.to(dtype).unsqueeze(1)
    turned_BLNH2 = torch.stack(
        (real_BLNH * cos_L1H - imag_BLNH * sin_L1H, real_BLNH * sin_L1H + imag_BLNH * cos_L1H), -1
    )
    return turned_BLNH2.flatten(-2).to(x_BLND.dtype)
