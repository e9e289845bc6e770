"""Specification of the gated residual in plain PyTorch (Wan, arXiv 2503.20314).

Shape suffixes: B batch, L tokens, C channels; S is 1 (one gate per sample) or L (one per token).
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbokernels.softmax_core import compute_dtype


def gate_residual(x_BLC: Tensor, y_BLC: Tensor, gate_BSC: Tensor) -> Tensor:
    """x + y * gate."""
    dtype = compute_dtype(x_BLC.dtype)
    return torch.addcmul(x_BLC.to(dtype), y_BLC.to(dtype), gate_BSC.to(dtype)).to(x_BLC.dtype)
