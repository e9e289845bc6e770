"""The published variants at a size that a test can run: the same kinds of networks, conditioning and codecs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_network, write_components
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from turbotrain.checkpoint import CheckpointMeta, save_checkpoint
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS

KINDS = {
    "t2v": "wan2.1_t2v_1.3b",
    "i2v": "wan2.1_i2v_14b",
    "ti2v": "wan2.2_ti2v_5b",
    "two experts": "wan2.2_i2v_a14b",
}
CHANNELS, TEXT, IMAGE_WIDTH = 4, (32, 64), 80
WIDTH, HEIGHT, FRAMES = 48, 32, 5  # latents (4, 2, 4, 6)


def use_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace each of KINDS by a tiny network of its kind."""
    for name in KINDS.values():
        variant = VARIANTS[name]
        extra = variant.config.condition_channels and 4 + CHANNELS  # mask and conditioning latent
        config = dataclasses.replace(
            variant.config,
            dim=32,
            ffn_dim=48,
            num_heads=2,
            num_layers=2,
            in_channels=CHANNELS + extra,
            out_channels=CHANNELS,
            text_len=TEXT[0],
            text_dim=TEXT[1],
            freq_dim=16,
            image_dim=variant.config.image_dim and IMAGE_WIDTH,
        )
        # vae="shapes": the tiny text encoder is small enough to stay in float32.
        tiny = dataclasses.replace(
            variant,
            config=config,
            vae="shapes",
            vae_stride=(4, 8, 8),
            teacher_steps=2,
            width=WIDTH,
            height=HEIGHT,
            frames=FRAMES,
        )
        monkeypatch.setitem(VARIANTS, name, tiny)


def write_model(folder: Path, name: str) -> Path:
    """A checkpoint with its VAE, text encoder and CLIP tower; of a two-expert variant a folder with high/ and low/."""
    variant = VARIANTS[name]
    components = write_components(folder.with_name(f"{folder.name} parts"), TEXT[1], CHANNELS)
    if variant.config.image_dim:
        components["image_encoder"] = str(_write_tower(folder.with_name(f"{folder.name} parts") / "image_encoder"))
    for seed, expert in enumerate(variant.experts):
        meta = CheckpointMeta(name, variant.config.to_dict(), AttentionConfig("dense").to_dict(), license="Apache-2.0")
        network = random_network(variant.config, AttentionConfig("dense"), seed)
        save_checkpoint(folder / expert, network.state_dict(), meta, components_from=components)
    return folder


def _write_tower(folder: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def write_picture(path: Path, width: int = 60, height: int = 40, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run_arguments(recipe: str, model: Path, shards: Path, output: Path) -> list[str]:
    """What makes a Wan recipe run on a network of `write_model` and shards drawn from it."""
    return [
        f"recipe={recipe}",
        f"output_dir={output}",
        f"model.teacher={model}",
        f"data.path={shards}",
        f"data.width={WIDTH}",
        f"data.height={HEIGHT}",
        f"data.frames={FRAMES}",
        "launch.device=cpu",
    ]
