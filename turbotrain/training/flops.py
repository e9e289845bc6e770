"""How much arithmetic a pass of the network is: what MFU is measured against.

L video tokens, S text tokens, D model width, F feed-forward width, d head dim. A multiplication and an addition count as two.
"""

from __future__ import annotations

import math

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import WanConfig

CLIP_TOKENS = 257


def forward_flops(config: WanConfig, attention: AttentionConfig, grid: tuple[int, ...]) -> float:
    """FLOPs of one forward pass of one sample whose latent has `grid` = (T, H, W); element-wise work is left out."""
    linears, attend, rest = _parts(config, attention, grid)
    return linears + attend + rest


def tangent_flops(config: WanConfig, attention: AttentionConfig, grid: tuple[int, ...]) -> float:
    """What the tangent of such a pass costs besides: linears once more, attention twice (four products to its two)."""
    linears, attend, _ = _parts(config, attention, grid)
    return linears + 2 * attend


def _parts(config: WanConfig, attention: AttentionConfig, grid: tuple[int, ...]) -> tuple[float, float, float]:
    """Linears of all video tokens, attention, and what text and image tokens take."""
    dim, ffn = config.dim, config.ffn_dim
    length = math.prod(n // p for n, p in zip(grid, config.patch_size))
    patch = math.prod(config.patch_size)
    clip_tokens = CLIP_TOKENS if config.image_dim is not None else 0
    context = config.text_len + clip_tokens

    self_linear = 8 * dim**2 * length
    cross_linear = 4 * dim**2 * length
    feed_forward = 4 * dim * ffn * length
    kept = sum(_kept_keys(layer, length) for layer in attention.by_layer(config.num_layers)) / config.num_layers
    attend = 4 * length * dim * (kept + context)
    if attention.is_sparse:
        attend += 6 * length * dim * config.head_dim  # state of keys and values, queries through it, projection
    keys_values = 4 * dim**2 * context
    text = 2 * config.text_len * dim * (config.text_dim + dim)
    image = 2 * clip_tokens * (config.image_dim or 0) * ((config.image_dim or 0) + dim)
    ends = 2 * length * dim * patch * (config.in_channels + config.out_channels)
    layers = config.num_layers
    linears = layers * (self_linear + cross_linear + feed_forward) + ends
    return float(linears), float(layers * attend), float(layers * keys_values + text + image)


def _kept_keys(attention: AttentionConfig, length: int) -> float:
    if not attention.is_sparse:
        return length
    blocks = -(-length // attention.block_k)
    return length * max(1, int(attention.topk * blocks)) / blocks
