"""Small checkpoints of every kind, for the tests of conversion and merging."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbotrain.checkpoint import CheckpointMeta, save_checkpoint
from turbotrain.checkpoint.identify import identify
from turbotrain.checkpoint.layouts import PUBLISHED_SLA
from turbotrain.checkpoint.stream import open_contents
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import QuantLinear
from turbotrain.model.variants import WanConfig
from turbotrain.model.wan import WanTransformer

CONFIG = WanConfig(
    dim=128, ffn_dim=192, num_heads=1, num_layers=2, text_dim=16, freq_dim=32, in_channels=4, out_channels=4
)
CLIP = dataclasses.replace(CONFIG, image_dim=24, in_channels=9, model_type="i2v")


def network(config: WanConfig = CONFIG, attention: AttentionConfig | None = None, seed: int = 0) -> WanTransformer:
    torch.manual_seed(seed)
    model = WanTransformer(config, attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def quantized(scheme: str, smooth: bool = False, uniform: bool = False, partly: bool = False) -> WanTransformer:
    """Every block linear in 8 bits; uniform: one scale a tensor; partly: cross-attention stays float."""
    model = network()
    for block in model.blocks:
        for name in [n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]:
            if partly and name.startswith("cross"):
                continue
            linear: Any = block.get_submodule(name)
            vector = torch.rand(linear.in_features) + 0.5 if smooth and name == "ffn.2" else None
            layer = QuantLinear.from_linear(linear, scheme, vector)
            if uniform:
                layer.scale = layer.scale.amax().expand_as(layer.scale).contiguous()
            block.set_submodule(name, layer)
        if smooth:
            block.smooth_ffn = torch.rand(CONFIG.dim) + 0.5
    return model


def save(folder: Path, model: WanTransformer, scheme: str | None = None, **fields: Any) -> Path:
    meta = CheckpointMeta(
        config=model.config.to_dict(),
        attention=model.attention_config.to_dict(),
        quantization=None if scheme is None else {"scheme": scheme},
        dtype=str(model.dtype).removeprefix("torch."),
        **fields,
    )
    save_checkpoint(folder, model.state_dict(), meta)
    return folder


def make(kind: str, folder: Path) -> Path:
    """A turbotrain folder: dense, half (bf16 with float32 islands), clip, sla, or an 8-bit scheme."""
    scheme = kind if kind in ("int8_channel", "int8_block128", "fp8_channel") else None
    models = {
        "dense": network,
        "half": lambda: network().set_weight_dtype(torch.bfloat16),
        "clip": lambda: network(CLIP),
        "sla": lambda: network(attention=PUBLISHED_SLA),
        "int8_channel": lambda: quantized("int8_channel"),
        "int8_block128": lambda: quantized("int8_block128"),
        "fp8_channel": lambda: quantized("fp8_channel", uniform=True),
    }
    sampler = {"sigma_max": 80.0, "times": [1.5, 1.4, 1.0], "ode": False}
    return save(folder, models[kind](), scheme, sampler=sampler, lineage=[{"stage": "teacher"}], license="Apache-2.0")


def output_path(folder: Path, layout: str, experts: int = 1) -> Path:
    """A place that suits the layout."""
    suffix = {"turbodiffusion": ".pth", "rcm": ".pth", "comfyui": ".safetensors"}.get(layout, "")
    return folder / f"{layout}{suffix if experts == 1 else ''}"


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor by the name in its file (of experts: behind their names)."""
    places = {expert: part.path for expert, part in identify(path).networks.items()}
    return {
        expert + name: entry.read()
        for expert, place in places.items()
        for name, entry in open_contents(place).entries.items()
    }


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name
