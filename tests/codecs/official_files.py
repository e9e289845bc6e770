"""Official files of real modules, written the other way round: each module is walked part by part, and every tensor gets the name
that the official code gives it. Nothing here reads the tables that the loaders use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

Named = Iterator[tuple[str, Tensor]]
WAN_21: dict[str, Any] = {}  # diffusers' defaults
WAN_22: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms and biases too, so that no two of them could be exchanged unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            offset = 1.0 if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")) else 0.0
            parameter.copy_(offset + noise * (0.1 if parameter.ndim == 1 else 0.5 / parameter[0].numel() ** 0.5))
    return module.eval()


def tiny_vae(version: str, width: int = 8) -> AutoencoderKLWan:
    """The published structure at another width: 2.1 in a row, 2.2 by level and with another width in the decoder."""
    if version == "2.1":
        return randomized(AutoencoderKLWan(base_dim=width))
    statistics = {"latents_mean": [0.1] * 48, "latents_std": [2.0] * 48}
    return randomized(AutoencoderKLWan(**{**WAN_22, **statistics, "base_dim": width, "decoder_base_dim": 2 * width}))


def tiny_umt5(vocabulary: int, width: int = 64) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=vocabulary, d_model=width, d_kv=16, d_ff=96, num_layers=3, num_heads=4)
    return randomized(UMT5EncoderModel(config))


def tiny_clip() -> CLIPVisionModel:
    sizes = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 2}
    return randomized(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=42, patch_size=14, hidden_act="gelu")))


def write(state: dict[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.detach().clone() for name, tensor in state.items()}, path)
    return path


def _affine(layer: Any, name: str) -> Named:
    yield f"{name}.weight", layer.weight
    if layer.bias is not None:
        yield f"{name}.bias", layer.bias


# ---- umT5 ---------------------------------------------------------------------------------------------------------------


def official_umt5(model: Any) -> dict[str, Tensor]:
    return dict(_umt5(model))


def _umt5(model: Any) -> Named:
    yield "token_embedding.weight", model.shared.weight
    for number, block in enumerate(model.encoder.block):
        here = f"blocks.{number}"
        attention, feed = block.layer[0], block.layer[1]
        yield f"{here}.norm1.weight", attention.layer_norm.weight
        for letter in "qkvo":
            yield f"{here}.attn.{letter}.weight", getattr(attention.SelfAttention, letter).weight
        yield f"{here}.pos_embedding.embedding.weight", attention.SelfAttention.relative_attention_bias.weight
        yield f"{here}.norm2.weight", feed.layer_norm.weight
        yield f"{here}.ffn.gate.0.weight", feed.DenseReluDense.wi_0.weight
        yield f"{here}.ffn.fc1.weight", feed.DenseReluDense.wi_1.weight
        yield f"{here}.ffn.fc2.weight", feed.DenseReluDense.wo.weight
    yield "norm.weight", model.encoder.final_layer_norm.weight


# ---- CLIP ---------------------------------------------------------------------------------------------------------------


def official_clip(model: Any, rest: bool = True) -> dict[str, Tensor]:
    """rest: also what the file holds besides the visual tower."""
    state = dict(_clip(model))
    if rest:
        state |= {"log_scale": torch.zeros(()), "visual.head": torch.zeros(4, 4)}
        state |= {"textual.token_embedding.weight": torch.zeros(4, 4), "textual.head.0.weight": torch.zeros(4, 4)}
    return state


def _clip(model: Any) -> Named:
    yield "visual.patch_embedding.weight", model.embeddings.patch_embedding.weight
    yield "visual.cls_embedding", model.embeddings.class_embedding[None, None]
    yield "visual.pos_embedding", model.embeddings.position_embedding.weight[None]
    yield from _affine(model.pre_layrnorm, "visual.pre_norm")
    for number, layer in enumerate(model.encoder.layers):
        here, attention = f"visual.transformer.{number}", layer.self_attn
        yield from _affine(layer.layer_norm1, f"{here}.norm1")
        for kind in ("weight", "bias"):
            parts = [getattr(part, kind) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            yield f"{here}.attn.to_qkv.{kind}", torch.cat(parts)
        yield from _affine(attention.out_proj, f"{here}.attn.proj")
        yield from _affine(layer.layer_norm2, f"{here}.norm2")
        yield from _affine(layer.mlp.fc1, f"{here}.mlp.0")
        yield from _affine(layer.mlp.fc2, f"{here}.mlp.2")
    yield from _affine(model.post_layernorm, "visual.post_norm")


# ---- VAE ----------------------------------------------------------------------------------------------------------------


def official_vae(vae: Any) -> dict[str, Tensor]:
    return dict(_vae(vae))


def _vae(vae: Any) -> Named:
    yield from _affine(vae.quant_conv, "conv1")
    yield from _affine(vae.post_quant_conv, "conv2")
    for side, part in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        yield from _affine(part.conv_in, f"{side}.conv1")
        yield from _residual(part.mid_block.resnets[0], f"{side}.middle.0")
        yield f"{side}.middle.1.norm.gamma", part.mid_block.attentions[0].norm.gamma
        yield from _affine(part.mid_block.attentions[0].to_qkv, f"{side}.middle.1.to_qkv")
        yield from _affine(part.mid_block.attentions[0].proj, f"{side}.middle.1.proj")
        yield from _residual(part.mid_block.resnets[1], f"{side}.middle.2")
        yield f"{side}.head.0.gamma", part.norm_out.gamma
        yield from _affine(part.conv_out, f"{side}.head.2")
    if vae.config.is_residual:
        yield from _levels(vae.encoder.down_blocks, "encoder.downsamples", "downsamples", "downsampler")
        yield from _levels(vae.decoder.up_blocks, "decoder.upsamples", "upsamples", "upsampler")
        return
    for number, stage in enumerate(vae.encoder.down_blocks):
        yield from _stage(stage, f"encoder.downsamples.{number}")
    number = 0
    for level in vae.decoder.up_blocks:
        for stage in [*level.resnets, *(level.upsamplers or [])]:
            yield from _stage(stage, f"decoder.upsamples.{number}")
            number += 1


def _levels(blocks: Any, outer: str, inner: str, resampler: str) -> Named:
    for number, level in enumerate(blocks):
        last = getattr(level, resampler)
        for position, stage in enumerate([*level.resnets, *([last] if last is not None else [])]):
            yield from _stage(stage, f"{outer}.{number}.{inner}.{position}")


def _stage(stage: Any, name: str) -> Named:
    if hasattr(stage, "conv1"):
        yield from _residual(stage, name)
        return
    yield from _affine(stage.resample[1], f"{name}.resample.1")
    if hasattr(stage, "time_conv"):
        yield from _affine(stage.time_conv, f"{name}.time_conv")


def _residual(block: Any, name: str) -> Named:
    yield f"{name}.residual.0.gamma", block.norm1.gamma
    yield from _affine(block.conv1, f"{name}.residual.2")
    yield f"{name}.residual.3.gamma", block.norm2.gamma
    yield from _affine(block.conv2, f"{name}.residual.6")
    if not isinstance(block.conv_shortcut, nn.Identity):
        yield from _affine(block.conv_shortcut, f"{name}.shortcut")
