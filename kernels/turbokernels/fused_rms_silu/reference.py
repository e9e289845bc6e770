"""Specification of the norm between the convolutions of Wan's VAE, in plain PyTorch (Wan, arXiv 2503.20314).

Shape suffixes: B batch, L positions, C channels.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from turbokernels.softmax_core import compute_dtype

# Norms below this count as this, as in torch.nn.functional.normalize.
SMALLEST_NORM = 1e-12


def rms_norm_silu(x_BLC: Tensor, weight_C: Tensor, residual_BLC: Tensor | None, out_BLC: Tensor) -> None:
    """x += residual, where there is one; out = silu(sqrt(C) x / |x| * weight), of x as it is stored."""
    dtype, channels = compute_dtype(x_BLC.dtype), x_BLC.shape[-1]
    if residual_BLC is not None:
        x_BLC.add_(residual_BLC)
    unit_BLC = F.normalize(x_BLC.to(dtype), dim=-1, eps=SMALLEST_NORM)
    out_BLC.copy_(F.silu(unit_BLC * (channels**0.5 * weight_C.to(dtype))))
