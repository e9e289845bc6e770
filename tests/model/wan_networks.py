"""Tiny networks of every published structure, with weights that make every term count, and their inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import WanConfig
from turbotrain.model.wan import WanTransformer

GRID = (3, 4, 6)  # latent frames, height, width: 3 * 2 * 3 = 18 tokens
_BASE = WanConfig(
    dim=48, ffn_dim=80, num_heads=3, num_layers=2, in_channels=4, out_channels=4, text_dim=20, text_len=9, freq_dim=32
)
STRUCTURES: dict[str, WanConfig] = {
    "t2v": _BASE,
    "i2v_clip": dataclasses.replace(_BASE, in_channels=9, image_dim=24, model_type="i2v"),
    "i2v_concat": dataclasses.replace(_BASE, in_channels=9, model_type="i2v"),
    "ti2v_per_token": dataclasses.replace(_BASE, model_type="ti2v"),
}


def randomise(model: WanTransformer, seed: int = 0) -> WanTransformer:
    """Weights of the usual scale for matrices, norms around 1, everything else (modulation, biases, P) well away from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "modulation" in name or parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def build(
    structure: str = "t2v", attention: AttentionConfig | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> WanTransformer:
    model = WanTransformer(STRUCTURES[structure], attention)
    return randomise(model, seed).set_weight_dtype(dtype)


def inputs(
    config: WanConfig,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    grid: tuple[int, int, int] = GRID,
    seed: int = 1,
) -> dict[str, Any]:
    """Keyword arguments of a call; per-token times for ti2v, image conditioning for i2v."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = grid[0] * grid[1] * grid[2] // 4
    per_token = config.model_type == "ti2v"
    timestep = 1000 * torch.rand((batch, tokens) if per_token else (batch,), generator=generator, dtype=torch.float64)
    given: dict[str, Any] = {
        "x_BCTHW": noise(batch, config.out_channels, *grid),
        "timestep": timestep.to(torch.float64 if dtype == torch.float64 else torch.float32),
        "context_BLD": noise(batch, config.text_len, config.text_dim),
    }
    if config.condition_channels:
        given["y_BCTHW"] = noise(batch, config.condition_channels, *grid)
    if config.image_dim is not None:
        given["clip_BLD"] = noise(batch, 5, config.image_dim)
    return given


def tangents_of(given: dict[str, Any], seed: int = 2) -> tuple[Tensor, Tensor]:
    """A direction in which both the latent and the time move, as along an ODE."""
    generator = torch.Generator().manual_seed(seed)
    x, timestep = given["x_BCTHW"], given["timestep"]
    tx = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    ttimestep = 40 * torch.randn(timestep.shape, generator=generator, dtype=torch.float64)
    return tx, ttimestep.to(timestep.dtype)


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()
