"""Specification of 8-bit quantisation in plain PyTorch (method.md section 7, formats.md section 4).

Shape suffixes: R rows (tokens or output channels, all leading dimensions), K features; L tokens of one sample, T
tiles along L, U tiles along K; `_E` has the operand's own shape. Everything is computed in float32. Division, not
multiplication by a reciprocal: IEEE division is correctly rounded on every device, so CPU and GPU round to the same
integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The largest magnitude of each 8-bit type; both ranges are used symmetrically.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# The smallest normal float32. A scale below it is subnormal: some devices flush those to zero, and x / 0 is not a
# number.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def safe_scale(scale: Tensor) -> Tensor:
    """Scales as they are stored: 1 where a row or tile is zero (or too small for a normal float32). NaN stays NaN."""
    return torch.where(scale < SMALLEST_SCALE, 1.0, scale)


def rounded_rows(x_RK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantised values of each row, still as float32 (..., K), and float32 scales (...): x ~ values * scale[..., None].

    A row with NaN or Inf has a non-finite scale or value, so that the product built on it is non-finite too.
    """
    x_RK = x_RK.float()
    limit = LIMITS[dtype]
    # By a tensor: on CUDA, PyTorch multiplies by the rounded reciprocal of a number, and ties then round otherwise.
    scale_R = safe_scale(x_RK.abs().amax(-1) / torch.full((), limit, device=x_RK.device))
    values_RK = x_RK / scale_R[..., None]
    if dtype == torch.int8:
        return values_RK.round_().clamp_(-limit, limit), scale_R
    # The cast rounds to nearest even and does not saturate: clamp first.
    return values_RK.clamp_(-limit, limit).to(dtype).float(), scale_R


def rounded_tiles(x_LK: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Int8 values of each block x block tile, as float32 (..., L, K), and float32 scales (..., T, U).

    The last tiles may be ragged. scale = amax / 128 and values in -128..127: +amax saturates, as in published
    `-quant.pth` files.
    """
    n_rows, n_columns = x_LK.shape[-2:]
    padded_LK = F.pad(x_LK.float(), (0, -n_columns % block, 0, -n_rows % block))
    tiles = padded_LK.unflatten(-1, (-(-n_columns // block), block)).unflatten(-3, (-(-n_rows // block), block))
    scale_TU = safe_scale(tiles.abs().amax((-3, -1)) / 128.0)  # tiles: (..., T, block, U, block)
    tiles = (tiles / scale_TU[..., :, None, :, None]).round_().clamp_(-128.0, 127.0)
    return tiles.flatten(-4, -3).flatten(-2, -1)[..., :n_rows, :n_columns], scale_TU


@torch.no_grad()
def quantize_rows(
    x_RK: Tensor, dtype: torch.dtype, activation: str | None = None, smooth_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per-row quantisation of x, of gelu_tanh(x) or of either / smooth: values of `dtype` (..., K), float32 scales (...).

    The activation and the division are float32 too, and not rounded to x's dtype before they are quantised.
    """
    values_RK, scale_R = rounded_rows(activated(x_RK, activation, smooth_K), dtype)
    return values_RK.to(dtype), scale_R


@torch.no_grad()
def quantize_block(
    x_LK: Tensor, block: int, activation: str | None = None, smooth_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per-tile quantisation, of what `quantize_rows` quantises: int8 values (..., L, K) and float32 scales
    (..., ceil(L / block), ceil(K / block)).
    """
    values_LK, scale_TU = rounded_tiles(activated(x_LK, activation, smooth_K), block)
    return values_LK.to(torch.int8), scale_TU


def activated(x_E: Tensor, activation: str | None, smooth_K: Tensor | None) -> Tensor:
    """activation(x) / smooth in float32."""
    x_E = x_E.float()
    if activation == "gelu_tanh":
        x_E = F.gelu(x_E, approximate="tanh")
    return x_E if smooth_K is None else x_E / smooth_K
