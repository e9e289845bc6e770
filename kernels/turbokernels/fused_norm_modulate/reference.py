"""Specification of LayerNorm + modulation in plain PyTorch (Wan, arXiv 2503.20314).

Shape suffixes: B batch, L tokens, C channels; S is 1 (one modulation per sample) or L (one per token).
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokernels.softmax_core import compute_dtype


def layer_norm_modulate(x_BLC: Tensor, scale_BSC: Tensor, shift_BSC: Tensor, eps: float) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * (1 + scale) + shift, mean and (biased) variance over C."""
    dtype = compute_dtype(x_BLC.dtype)
    normed_BLC = torch.nn.functional.layer_norm(x_BLC.to(dtype), x_BLC.shape[-1:], eps=eps)
    return torch.addcmul(shift_BSC.to(dtype), normed_BLC, 1.0 + scale_BSC.to(dtype)).to(x_BLC.dtype)
