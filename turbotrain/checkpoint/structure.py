"""Which tensors a Wan network has, from its dimensions alone: what a checkpoint lacks or has too much. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from turbotrain.checkpoint.keymaps import turbodiffusion
from turbotrain.checkpoint.layouts import HEAD_PROJECTION
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import WanConfig

Shape = tuple[int, ...]
# The linears of a block that are quantized; P of SLA is not one of them.
BLOCK_LINEAR = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.([qkvo]|[kv]_img)|ffn\.[02])")
# Vectors of SmoothQuant that a block applies in its modulation (model/quant_linear.py).
BLOCK_VECTORS = ("smooth_attn", "smooth_ffn")
TILE = 128


def expected_shapes(config: WanConfig, attention: AttentionConfig) -> dict[str, Shape]:
    """{native name: shape} of the floating-point network, as WanTransformer builds it."""
    shapes: dict[str, Shape] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def affine(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    dim, patch = config.dim, config.patch_size
    shapes["patch_embedding.weight"] = (dim, config.in_channels, *patch)
    shapes["patch_embedding.bias"] = (dim,)
    linear("text_embedding.0", config.text_dim, dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", config.freq_dim, dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", dim, 6 * dim)
    linear("head.head", dim, config.out_channels * math.prod(patch))
    shapes["head.modulation"] = (1, 2, dim)
    if config.image_dim is not None:
        affine("img_emb.proj.0", config.image_dim)
        linear("img_emb.proj.1", config.image_dim, config.image_dim)
        linear("img_emb.proj.3", config.image_dim, dim)
        affine("img_emb.proj.4", dim)
    for number in range(config.num_layers):
        block = f"blocks.{number}"
        shapes[f"{block}.modulation"] = (1, 6, dim)
        affine(f"{block}.norm3", dim)
        for attn in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"{block}.{attn}.{name}", dim, dim)
            for name in ("norm_q", "norm_k"):
                shapes[f"{block}.{attn}.{name}.weight"] = (dim,)
        if config.image_dim is not None:
            linear(f"{block}.cross_attn.k_img", dim, dim)
            linear(f"{block}.cross_attn.v_img", dim, dim)
            shapes[f"{block}.cross_attn.norm_k_img.weight"] = (dim,)
        linear(f"{block}.ffn.0", dim, config.ffn_dim)
        linear(f"{block}.ffn.2", config.ffn_dim, dim)
        if attention.is_sparse:
            linear(f"{block}.{HEAD_PROJECTION}", config.head_dim, config.head_dim)
    return shapes


def compare(
    found: Mapping[str, Shape], config: WanConfig, attention: AttentionConfig
) -> tuple[list[str], list[str], list[str]]:
    """(missing, unexpected, of the wrong shape): what native tensors of these shapes lack of the network, or add to it.

    8-bit layers stand for their weight: `X.int8_weight` or `X.fp8_weight` with `X.scale`, perhaps `X.smooth`.
    """
    expected = expected_shapes(config, attention)
    for name in found:
        layer, _, kind = name.rpartition(".")
        weight = expected.get(f"{layer}.weight")
        if kind in turbodiffusion.QUANTIZED_WEIGHTS and weight is not None and BLOCK_LINEAR.fullmatch(layer):
            del expected[f"{layer}.weight"]
            expected[name] = weight
            tiled = kind == "int8_weight" and len(found.get(f"{layer}.scale", ())) == 2
            expected[f"{layer}.scale"] = (-(-weight[0] // TILE), -(-weight[1] // TILE)) if tiled else (weight[0],)
            if f"{layer}.smooth" in found:
                expected[f"{layer}.smooth"] = (weight[1],)
        elif kind in BLOCK_VECTORS and re.fullmatch(r"blocks\.\d+", layer):
            expected[name] = (config.dim,)
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return missing, unexpected, wrong
