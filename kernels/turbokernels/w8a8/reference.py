"""Specification of W8A8 linear layers in plain PyTorch (method.md section 7).

Shape suffixes: M tokens (all leading dimensions), K input features, N output features; L tokens of one sample; U
tiles along K.

The integer product is exact on every device, so CPU and GPU differ at most by the rounding of the float32 epilogue:
- CUDA: int8 tensor cores (`torch._int_mm`), int32 accumulation.
- elsewhere: float32 matrix products of the integers, in slices of K so short that every partial sum is an integer of
  at most 2^24, which float32 holds exactly in any order of summation; slices are added in int32. The factors have at
  most 8 significant bits, so TF32 and bf16 matrix modes are exact as well. On CPU this is about 20 times faster than
  `torch._int_mm` without VNNI (one AVX2 core: 4096 x 128 -> 384 in 8 ms against 174, 4096 x 1536 -> 8960 in 3.1 s
  against 72) and 1.4 to 1.9 times faster than float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from turbokernels.quantize.reference import rounded_rows, rounded_tiles

BLOCK = 128
# 1024 * 128 * 128 = 2^24: the longest slice of K whose int8 products sum to at most 2^24 in magnitude.
EXACT_SLICE = 1024


def _int8_product_cuda(values_MK: Tensor, w_NK: Tensor) -> Tensor:
    """int32 product by tensor cores; zero rows and columns are added where `torch._int_mm` asks for them (M > 16, K
    and N in 8s).
    """
    n_tokens, n_features = values_MK.shape[0], w_NK.shape[0]
    pad_features, pad_outputs = -values_MK.shape[1] % 8, -n_features % 8
    a_MK = F.pad(values_MK.to(torch.int8), (0, pad_features, 0, max(0, 17 - n_tokens))).contiguous()
    b_NK = F.pad(w_NK, (0, pad_features, 0, pad_outputs)).contiguous()
    return torch._int_mm(a_MK, b_NK.t())[:n_tokens, :n_features]


def _fp8_product_cuda(values_MK: Tensor, w_NK: Tensor) -> Tensor:
    """float32 product by fp8 tensor cores; K and N are padded to 16 as `torch._scaled_mm` asks."""
    capability = torch.cuda.get_device_capability(w_NK.device)
    if capability < (8, 9):
        raise ValueError(
            f"w8a8_linear: fp8_channel needs compute capability 8.9 or newer; this GPU has "
            f"{capability[0]}.{capability[1]}: quantise to int8_channel, or dequantise the model"
        )
    n_features = w_NK.shape[0]
    pad_features, pad_outputs = -values_MK.shape[1] % 16, -n_features % 16
    # float8 has no padding kernel: pad the activations before the cast, the weight through its bytes (0x00 is 0.0).
    a_MK = F.pad(values_MK, (0, pad_features)).to(w_NK.dtype).contiguous()
    b_NK = F.pad(w_NK.view(torch.uint8), (0, pad_features, 0, pad_outputs)).contiguous().view(w_NK.dtype)
    one = torch.ones((), device=w_NK.device)
    return torch._scaled_mm(a_MK, b_NK.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)[:, :n_features]


def product(values_MK: Tensor, w_NK: Tensor) -> Tensor:
    """values @ w^T as float32 (M, N); exact for int8 up to the one rounding of the int32 sum to float32.

    values_MK: float32 holding values of w's 8-bit type. fp8 products accumulate in float32, in the device's order.
    """
    if w_NK.is_cuda:
        kernel = _int8_product_cuda if w_NK.dtype == torch.int8 else _fp8_product_cuda
        return kernel(values_MK, w_NK).float()
    slices = list(range(0, w_NK.shape[1], EXACT_SLICE))
    if len(slices) == 1 or w_NK.dtype != torch.int8:
        return values_MK @ w_NK.float().t()
    total_MN = torch.zeros(values_MK.shape[0], w_NK.shape[0], dtype=torch.int32, device=w_NK.device)
    for start in slices:
        part = slice(start, start + EXACT_SLICE)
        total_MN += (values_MK[:, part] @ w_NK[:, part].float().t()).int()
    return total_MN.float()


def _rows(values: Tensor, x_scale: Tensor, w_q_NK: Tensor, w_scale_N: Tensor) -> Tensor:
    """Scales per token and per output channel: they leave the sum over K."""
    return product(values.flatten(0, -2), w_q_NK).mul_(x_scale.flatten()[:, None]).mul_(w_scale_N)


def _tiles(values_LK: Tensor, x_scale_TU: Tensor, w_q_NK: Tensor, w_scale_VU: Tensor) -> Tensor:
    """Scales per 128 x 128 tile of both operands: exact integer products of each K tile, scaled and summed in
    float32, K ascending.
    """
    n_features, n_inputs = w_q_NK.shape
    values_MK = values_LK.flatten(0, -2)
    x_scale_MU = x_scale_TU.repeat_interleave(BLOCK, -2)[..., : values_LK.shape[-2], :].flatten(0, -2)
    w_scale_NU = w_scale_VU.repeat_interleave(BLOCK, 0)[:n_features]
    y_MN = torch.zeros(values_MK.shape[0], n_features, device=values_LK.device)
    for tile, start in enumerate(range(0, n_inputs, BLOCK)):
        part = slice(start, start + BLOCK)
        scale_MN = x_scale_MU[:, tile, None] * w_scale_NU[:, tile]
        y_MN += product(values_MK[:, part], w_q_NK[:, part]).mul_(scale_MN)
    return y_MN


@torch.no_grad()
def w8a8_linear(
    x: Tensor | tuple[Tensor, Tensor],
    w_q_NK: Tensor,
    w_scale: Tensor,
    bias_N: Tensor | None,
    scheme: str,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Quantise x (..., L, K), unless it is values and scales already; multiply in 8 bits; scale, add the bias and
    activate in float32; return (..., L, N) in `out_dtype`.
    """
    in_tiles = scheme == "int8_block128"
    if not isinstance(x, Tensor):
        values, x_scale = x[0].float(), x[1]
    else:
        values, x_scale = rounded_tiles(x, BLOCK) if in_tiles else rounded_rows(x, w_q_NK.dtype)
    # Autocast would hand the integers' sums back in bf16, which holds 8 bits of them.
    with torch.autocast(values.device.type, enabled=False):
        y_MN = (_tiles if in_tiles else _rows)(values, x_scale, w_q_NK, w_scale)
    if bias_N is not None:
        y_MN += bias_N
    if activation == "gelu_tanh":
        y_MN = F.gelu(y_MN, approximate="tanh")
    return y_MN.to(out_dtype).view(*values.shape[:-1], w_q_NK.shape[0])
