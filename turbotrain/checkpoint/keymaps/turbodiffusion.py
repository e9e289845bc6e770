"""TurboDiffusion and rCM files (formats.md 4): official names, with these differences."""

from __future__ import annotations

# Training files: the EMA weights, when a file has both, are the ones that are sampled.
PREFIX = "net."
EMA_PREFIX = "net_ema."

# Saved as a matrix [dim, in * 4]; official files hold the Conv3d weight [dim, in, 1, 2, 2]. A plain reshape.
FLATTENED = "patch_embedding.weight"
PATCH_SIZE = (1, 2, 2)

# `-quant.pth`: `X.int8_weight` with one scale per 128 x 128 tile at `X.scale`. Our own 8-bit names extend these.
QUANTIZED_WEIGHTS: tuple[str, ...] = ("int8_weight", "fp8_weight")
