"""From a checkpoint's path to the parts of a pipeline, each on its device in its precision: networks, VAE, text encoder.

Everything that a file can say is read and checked before the first weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from turbotrain.checkpoint import CheckpointMeta, load_transformer, read_meta
from turbotrain.checkpoint.components import find_component
from turbotrain.checkpoint.header import expert_folders
from turbotrain.codecs import PromptEncoder, VideoCodec
from turbotrain.codecs.prompts import prompt_encoder
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import prepare_for_inference
from turbotrain.model.variants import VARIANTS, Variant, WanConfig


@dataclass(frozen=True)
class Source:
    """What a checkpoint says of itself (build it with `read_source`).

    Attributes:
        folders, metas: one a network, the high-noise expert first.
        attention_kind: overrides what the networks were saved with; None: as saved.
    """

    path: Path
    folders: tuple[Path, ...]
    metas: tuple[CheckpointMeta, ...]
    variant: Variant
    attention_kind: str | None

    @property
    def meta(self) -> CheckpointMeta:
        return self.metas[0]

    @property
    def config(self) -> WanConfig:
        return WanConfig.from_dict(self.meta.config)

    def find_components(self, given: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """Where each part lies that the variant needs; `given` replaces or completes what the metadata names.

        Raises:
            ValueError: a part is nowhere.
        """
        parts = {**self.meta.components, **{key: value for key, value in (given or {}).items() if value}}
        wanted = ["vae", "text_encoder", "tokenizer", *(["image_encoder"] if self.config.image_dim is not None else [])]
        return {key: find_component(key, parts, self.path) for key in wanted}


def read_source(path: str | Path, variant: str | None = None, attention_kind: str | None = None) -> Source:
    """Reads the metadata of a checkpoint folder (with `high/` and `low/` for two experts) or single file.

    Raises:
        ValueError: the variant is unknown or contradicts the metadata; another attention for a network trained dense.
    """
    path = Path(path).expanduser()
    folders = tuple(expert_folders(path) or (path,))
    metas = tuple(read_meta(folder) for folder in folders)
    told = metas[0].variant
    if variant is not None and told and told != variant:
        raise ValueError(f"variant={variant!r}: {path} says it is {told!r}; leave variant out")
    name = variant or told
    if name not in VARIANTS:
        raise ValueError(f"variant={name!r}: unknown for {path}; say variant= one of {', '.join(VARIANTS)}")
    if attention_kind is not None and not all(AttentionConfig.from_dict(meta.attention).is_sparse for meta in metas):
        raise ValueError(f"attention_kind={attention_kind!r}: {path} was trained with dense attention; leave it out")
    return Source(path, folders, metas, VARIANTS[name], attention_kind)


def load_codec(source: Source, place: str, device: torch.device, dtype: torch.dtype | None) -> VideoCodec:
    """The VAE, in the precision of `side_dtype`. Raises ValueError where the networks were trained on other latents."""
    codec = VideoCodec.from_pretrained(place, device=str(device), dtype=side_dtype(source, device, dtype))
    if codec.latent_channels != source.config.out_channels:
        raise ValueError(
            f"vae={place}: gives {codec.latent_channels} latent channels, but {source.path} was trained on "
            f"{source.config.out_channels}; use the VAE of variant {source.variant.name}"
        )
    return codec


def load_prompt_encoder(
    source: Source,
    places: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype | None,
    text_device: str = "auto",
    text_dtype: str = "auto",
    text_cache: Path | None = None,
) -> PromptEncoder:
    """The text encoder with its memory; arguments as `TurboPipeline.from_checkpoint` takes them."""
    # umT5-XXL is published, and used by Wan, in bf16; small worlds have encoders of their own.
    default = side_dtype(source, device, dtype) if source.variant.vae == "shapes" else torch.bfloat16
    return prompt_encoder(places, source.config, device, default, text_device, text_dtype, text_cache)


def load_networks(
    source: Source, device: torch.device, dtype: torch.dtype | None, home: torch.device | None = None
) -> list[nn.Module]:
    """Every network of the checkpoint on `device`; int8 layers stay int8 unless a dtype is given.

    home: where the weights are instead, in the precision for `device`, until something brings them there.
    """
    attention = None if source.attention_kind is None else {"kind": source.attention_kind}
    return [
        prepare_for_inference(
            load_transformer(folder, str(home or device), network_dtype(meta, device, dtype), attention)
        )
        for folder, meta in zip(source.folders, source.metas)
    ]


def network_dtype(meta: CheckpointMeta, device: torch.device, wanted: torch.dtype | None) -> torch.dtype | None:
    """The precision of a network's float weights: what is wanted, else float32 on the CPU, else the checkpoint's own (bfloat16
    where it says nothing). None, for quantised checkpoints, keeps int8 layers int8."""
    if wanted is not None or meta.quantization:
        return wanted
    if device.type == "cpu":
        return torch.float32
    return getattr(torch, meta.dtype, torch.bfloat16) if meta.dtype else torch.bfloat16


def side_dtype(source: Source, device: torch.device, wanted: torch.dtype | None) -> torch.dtype | None:
    """The precision of the parts beside the networks, which are never quantised: always float32 on the CPU."""
    wanted = None if device.type == "cpu" else wanted
    return network_dtype(replace(source.meta, quantization=None), device, wanted)


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is cuda where there is one, else cpu. Raises ValueError for a cuda device that is not there."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(device)
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            raise ValueError(
                f"device = {str(device)!r}: torch sees {count} CUDA device(s); use device=cpu or device=auto"
            )
    return place
