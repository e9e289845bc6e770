"""Real classes at tiny size, written as folders: VAEs with and without patches, a text encoder with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from turbotrain.stages.codec import tiny_text_encoder

CHANNELS = 6
MEAN = [0.1 * index - 0.2 for index in range(CHANNELS)]
STD = [0.5 + 0.3 * index for index in range(CHANNELS)]
TEXT_LEN = 12


def write_vae(folder: Path, patch_size: int | None) -> Path:
    """A VAE of stride (4, 4, 4), times its patches, with random weights."""
    torch.manual_seed(0)
    channels = 3 * (patch_size or 1) ** 2
    AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=MEAN,
        latents_std=STD,
        in_channels=channels,
        out_channels=channels,
        patch_size=patch_size,
        scale_factor_spatial=4 * (patch_size or 1),
    ).save_pretrained(folder)
    return folder


def write_text(folder: Path) -> tuple[Path, Path]:
    """(text_encoder, tokenizer) with random weights."""
    torch.manual_seed(0)
    text = tiny_text_encoder(TEXT_LEN)
    text.encoder.save_pretrained(folder / "text_encoder")
    text.tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "text_encoder", folder / "tokenizer"
