"""The small pure functions of the Wan block, computed in float32 (or better) and returned in the input's dtype.

`lift` (tangent.py) gives each of them its tangent. Shape suffixes: B batch, L tokens, M 1 or L (one modulation for the
sample, or one for each token), D features, N heads, H head dim, P = H / 2 rotary pairs, F features of the time code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from turbotrain.model.tangent import wide


def time_code(timestep_BM: Tensor, width: int) -> Tensor:
    """(B, M, F=width) float64: cosines, then sines, of timestep * 10000^(-2 j / width). Timesteps are 1000 s."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep_BM.device) / half
    angles = timestep_BM.double()[..., None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def norm_modulate(x_BLD: Tensor, shift_BMD: Tensor, scale_BMD: Tensor, smooth_D: Tensor | None, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, divided by SmoothQuant's `smooth_D` where there is one.

    The division acts on the modulation vectors, so it costs nothing beside the norm.
    """
    gain_BMD = 1 + scale_BMD
    if smooth_D is not None:
        gain_BMD, shift_BMD = gain_BMD / smooth_D, shift_BMD / smooth_D
    normed_BLD = F.layer_norm(wide(x_BLD), x_BLD.shape[-1:], eps=eps)
    return torch.addcmul(shift_BMD, normed_BLD, gain_BMD).to(x_BLD.dtype)


def affine_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * weight + bias."""
    if torch.compiler.is_compiling():  # whose forward mode knows norms without weights only
        normed_BLD = F.layer_norm(wide(x_BLD), x_BLD.shape[-1:], eps=eps)
        return torch.addcmul(wide(bias_D), normed_BLD, wide(weight_D)).to(x_BLD.dtype)
    return F.layer_norm(wide(x_BLD), x_BLD.shape[-1:], wide(weight_D), wide(bias_D), eps).to(x_BLD.dtype)


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the full width of all heads."""
    return F.rms_norm(wide(x_BLD), x_BLD.shape[-1:], wide(weight_D), eps).to(x_BLD.dtype)


def norm_rope(x_BLD: Tensor, weight_D: Tensor, rope_2LP: Tensor, eps: float) -> Tensor:
    """RMSNorm over all heads, then the rotation of neighbouring pairs by angles of cosine and sine `rope`: (B, L, N, H)."""
    normed_BLD = F.rms_norm(wide(x_BLD), x_BLD.shape[-1:], wide(weight_D), eps)
    if torch.compiler.is_compiling():  # which knows no complex numbers
        cos_LP, sin_LP = (part[:, None] for part in rope_2LP.unbind())
        a_BLNP, b_BLNP = normed_BLD.unflatten(-1, (-1, rope_2LP.shape[-1], 2)).unbind(-1)
        turned = torch.stack([a_BLNP * cos_LP - b_BLNP * sin_LP, a_BLNP * sin_LP + b_BLNP * cos_LP], dim=-1)
        return turned.flatten(-2).to(x_BLD.dtype)
    turn_LP = torch.complex(*rope_2LP.unbind())
    pairs_BLNP = torch.view_as_complex(normed_BLD.unflatten(-1, (-1, turn_LP.shape[-1], 2)))
    return torch.view_as_real(pairs_BLNP * turn_LP[:, None]).flatten(-2).to(x_BLD.dtype)


def gated_residual(x_BLD: Tensor, branch_BLD: Tensor, gate_BMD: Tensor) -> Tensor:
    """x + branch * gate."""
    return torch.addcmul(wide(x_BLD), wide(branch_BLD), gate_BMD).to(x_BLD.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
