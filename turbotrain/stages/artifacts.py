"""What stages read and write: checkpoints with their lineage, the codec beside them, sample strips while training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from turbotrain.checkpoint import CheckpointMeta, read_meta, save_checkpoint
from turbotrain.codecs import TextEncoder, VideoCodec
from turbotrain.config import Config
from turbotrain.evaluation.video import contact_sheet, write_image
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import Variant
from turbotrain.model.wan import WanTransformer
from turbotrain.pipeline import TurboPipeline
from turbotrain.stages.context import StageContext
from turbotrain.training.ema import PowerEMA

COMPONENTS = ("vae", "text_encoder", "tokenizer")
# The tiny codecs of small worlds travel with every checkpoint; Wan's 11 GB text encoder is referred to.
COPIED_UP_TO = 64 * 2**20


def attention_config(config: Config) -> AttentionConfig:
    section = config.attention
    return AttentionConfig(
        section.kind, section.topk, section.block_q, section.block_k, section.order, section.feature_map
    )


def sampler_settings(config: Config) -> dict[str, object]:
    """What a Turbo checkpoint records of its sampler."""
    return {"sigma_max": config.sampler.sigma_max, "times": list(config.sampler.times), "ode": config.sampler.ode}


def load_codec(folder: Path, device: torch.device, variant: Variant) -> tuple[VideoCodec, TextEncoder]:
    codec = VideoCodec.from_pretrained(str(folder / "vae"), device=str(device), dtype=torch.float32)
    text = TextEncoder.from_pretrained(
        str(folder / "text_encoder"),
        str(folder / "tokenizer"),
        device=str(device),
        dtype=torch.float32,
        text_len=variant.config.text_len,
    )
    return codec, text
