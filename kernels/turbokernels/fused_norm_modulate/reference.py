"""Specification of LayerNorm + modulation in plain PyTorch (Wan, arXiv 2503.20314).

Shape suffixes: B batch, L tokens, C channels; S is 1 (one modulation per sample) or L (one per token).
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokernels.quantize.reference import quantize_rows
from turbokernels.softmax_core import compute_dtype


def modulated(x_BLC: Tensor, scale_BSC: Tensor, shift_BSC: Tensor, eps: float, affine: bool) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * (1 + scale) + shift, mean and (biased) variance over C; not rounded to x's
    dtype. Affine: times scale alone.
    """
    dtype = compute_dtype(x_BLC.dtype)
    normed_BLC = torch.nn.functional.layer_norm(x_BLC.to(dtype), x_BLC.shape[-1:], eps=eps)
    gain_BSC = scale_BSC.to(dtype) if affine else 1.0 + scale_BSC.to(dtype)
    return torch.addcmul(shift_BSC.to(dtype), normed_BLC, gain_BSC)


def layer_norm_modulate(
    x_BLC: Tensor, scale_BSC: Tensor, shift_BSC: Tensor, eps: float, affine: bool = False
) -> Tensor:
    """`modulated`, in x's dtype."""
    return modulated(x_BLC, scale_BSC, shift_BSC, eps, affine).to(x_BLC.dtype)


@torch.no_grad()
def layer_norm_modulate_quantize(
    x_BLC: Tensor, scale_BSC: Tensor, shift_BSC: Tensor, eps: float, dtype: torch.dtype, affine: bool = False
) -> tuple[Tensor, Tensor]:
    """`modulated`, quantised per token: values of `dtype` (B, L, C), float32 scales (B, L)."""
    return quantize_rows(modulated(x_BLC, scale_BSC, shift_BSC, eps, affine), dtype)
