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
    return torch.addcmul(shift_BMD, _layer_norm(x_BLD, None, None, eps), gain_BMD).to(x_BLD.dtype)


def affine_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * weight + bias."""
    return _layer_norm(x_BLD, weight_D, bias_D, eps).to(x_BLD.dtype)


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the full width of all heads."""
    return _rms_norm(x_BLD, weight_D, eps).to(x_BLD.dtype)


def norm_rope(x_BLD: Tensor, weight_D: Tensor, rope_2LP: Tensor, eps: float) -> Tensor:
    """RMSNorm over all heads, then the rotation of neighbouring pairs by angles of cosine and sine `rope`: (B, L, N, H)."""
    normed_BLNH = _rms_norm(x_BLD, weight_D, eps).unflatten(-1, (-1, 2 * rope_2LP.shape[-1]))
    return _turned(normed_BLNH, rope_2LP).to(x_BLD.dtype)


# A compiler's forward mode knows no fused norm with weights and no complex numbers: what it is shown is written out.


def _layer_norm(x_BLD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float) -> Tensor:
    x_BLD = wide(x_BLD)
    weight_D, bias_D = (None if value is None else wide(value) for value in (weight_D, bias_D))
    if not torch.compiler.is_compiling():
        return F.layer_norm(x_BLD, x_BLD.shape[-1:], weight_D, bias_D, eps)
    x_BLD = x_BLD - x_BLD.mean(-1, keepdim=True)
    normed_BLD = x_BLD * torch.rsqrt(x_BLD.square().mean(-1, keepdim=True) + eps)
    return normed_BLD if weight_D is None or bias_D is None else normed_BLD * weight_D + bias_D


def _rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x_BLD = wide(x_BLD)
    if not torch.compiler.is_compiling():
        return F.rms_norm(x_BLD, x_BLD.shape[-1:], wide(weight_D), eps)
    return x_BLD * torch.rsqrt(x_BLD.square().mean(-1, keepdim=True) + eps) * wide(weight_D)


def _turned(x_BLNH: Tensor, rope_2LP: Tensor) -> Tensor:
    pairs_BLNP2 = x_BLNH.unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        turn_LP = torch.complex(*rope_2LP.unbind())
        return torch.view_as_real(torch.view_as_complex(pairs_BLNP2) * turn_LP[:, None]).flatten(-2)
    cos_LP, sin_LP = (part[:, None] for part in rope_2LP.unbind())
    a_BLNP, b_BLNP = pairs_BLNP2.unbind(-1)
    return torch.stack([a_BLNP * cos_LP - b_BLNP * sin_LP, a_BLNP * sin_LP + b_BLNP * cos_LP], dim=-1).flatten(-2)


def gated_residual(x_BLD: Tensor, branch_BLD: Tensor, gate_BMD: Tensor) -> Tensor:
    """x + branch * gate."""
    return torch.addcmul(wide(x_BLD), wide(branch_BLD), gate_BMD).to(x_BLD.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
