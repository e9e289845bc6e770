"""How much arithmetic a pass of the network is: what MFU is measured against.

L video tokens, S text tokens, D model width, F feed-forward width, d head dim. A multiplication and an addition count as two.
Element-wise work and the time embedding are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

from turbotrain.config import LoraSection
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import CLIP_TOKENS, WanConfig


@dataclass(frozen=True)
class _Product:
    """FLOPs of one product in a forward pass. A backward pass takes as many for the gradient of its weight, where that is
    trained, and as many for the gradient of its input, where anything before it is. kind: video, context, attention."""

    flops: float
    kind: str
    trained: bool
    reached: bool


def forward_flops(
    config: WanConfig, attention: AttentionConfig, grid: tuple[int, ...], lora: LoraSection | None = None
) -> float:
    """FLOPs of one forward pass of one sample whose latent has `grid` = (T, H, W). lora: of a network with such an adapter."""
    return sum(product.flops for product in _products(config, attention, grid, lora))


def backward_flops(
    config: WanConfig, attention: AttentionConfig, grid: tuple[int, ...], lora: LoraSection | None = None
) -> float:
    """FLOPs of its backward pass: about two forward passes where every weight is trained, one where most are frozen. Attention
    counts as two, a little too much where lora.targets leave out what feeds it."""
    return sum(
        product.flops * (product.trained + product.reached) for product in _products(config, attention, grid, lora)
    )


def tangent_flops(
    config: WanConfig, attention: AttentionConfig, grid: tuple[int, ...], lora: LoraSection | None = None
) -> float:
    """What the tangent of such a pass costs besides: linears once more, attention twice (four products to its two)."""
    again = {"video": 1, "attention": 2, "context": 0}
    return sum(product.flops * again[product.kind] for product in _products(config, attention, grid, lora))


def _products(
    config: WanConfig, attention: AttentionConfig, grid: tuple[int, ...], lora: LoraSection | None
) -> Iterator[_Product]:
    dim, ffn, text, image = config.dim, config.ffn_dim, config.text_len, config.image_dim
    length = math.prod(n // p for n, p in zip(grid, config.patch_size))
    patch = math.prod(config.patch_size)
    clip = 0 if image is None else CLIP_TOKENS
    whole = lora is None

    yield _Product(2 * length * config.in_channels * patch * dim, "video", whole, reached=False)
    yield _Product(2 * text * config.text_dim * dim, "context", whole, reached=False)
    yield _Product(2 * text * dim * dim, "context", whole, whole)
    if image is not None:
        yield _Product(2 * clip * image * (image + dim), "context", whole, whole)
    for block, layer in enumerate(attention.by_layer(config.num_layers)):
        # Only frozen weights come before the first block's q, k and v, and before every k and v of text and image.
        inner = whole or block > 0
        linears = [(f"self_attn.{name}", "video", length, dim, dim, inner) for name in "qkv"]
        linears += [(name, "video", length, dim, dim, True) for name in ("self_attn.o", "cross_attn.q", "cross_attn.o")]
        linears += [(f"cross_attn.{name}", "context", text, dim, dim, whole) for name in "kv"]
        linears += [(f"cross_attn.{name}_img", "context", clip, dim, dim, whole) for name in "kv" if clip]
        linears += [("ffn.0", "video", length, dim, ffn, True), ("ffn.2", "video", length, ffn, dim, True)]
        for name, kind, rows, n_in, n_out, reached in linears:
            yield _Product(2 * rows * n_in * n_out, kind, whole, reached)
            if lora is not None and any(fnmatch(name, target) for target in lora.targets):
                yield _Product(2 * rows * n_in * lora.rank, kind, True, reached)
                yield _Product(2 * rows * lora.rank * n_out, kind, True, reached=True)
        attend = 4 * length * dim * (_kept_keys(layer, length) + text + clip)
        if layer.is_sparse:
            attend += 6 * length * dim * config.head_dim  # state of keys and values, queries through it, projection
        yield _Product(attend, "attention", trained=True, reached=True)
    yield _Product(2 * length * dim * config.out_channels * patch, "video", whole, reached=True)


def _kept_keys(attention: AttentionConfig, length: int) -> float:
    if not attention.is_sparse:
        return length
    blocks = -(-length // attention.block_k)
    return length * max(1, int(attention.topk * blocks)) / blocks
