"""Names and dimensions of the official VAE files, from names and shapes alone.

Wan 2.1 numbers the stages of a side in one row: residual blocks of a level, its resampling, the next level's blocks, and so on.
diffusers keeps that row in the encoder and counts by level in the decoder. Wan 2.2 counts by level on both sides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from turbotrain.checkpoint.keymaps import vae

_STAGE = re.compile(r"(encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(?:(?:down|up)samples\.(\d+)\.)?")
_RESAMPLING = ("resample.", "time_conv.")
_PATCHES = {12: 2}  # channels of a pixel patch: RGB times 2 x 2


@dataclass(frozen=True)
class Stage:
    """One residual block or resampling. prefix: of its tensors in the file, with the dot."""

    prefix: str
    resamples: bool


Levels = list[list[Stage]]


def levels(names: Iterable[str], side: str) -> Levels:
    """The stages of `encoder` or `decoder`, level by level; empty where the file has none."""
    rows: dict[tuple[int, int], Stage] = {}
    for name in names:
        match = _STAGE.match(name)
        if match is None or not name.startswith(side):
            continue
        nested = match.group(3) is not None
        place = (int(match.group(2)), int(match.group(3))) if nested else (-1, int(match.group(2)))
        resamples = name[match.end() :].startswith(_RESAMPLING)
        rows[place] = Stage(match.group(0), resamples)
    found: Levels = []
    last: int | None = None
    for place, stage in sorted(rows.items()):
        number = place[0]
        starts = number != last if number >= 0 else not found or found[-1][-1].resamples
        if starts:
            found.append([])
        found[-1].append(stage)
        last = number
    return found


def is_nested(sides: Iterable[Levels]) -> bool:
    """Whether stages are counted by level, as in Wan 2.2."""
    return any(stage.prefix.count("samples.") > 1 for side in sides for level in side for stage in level)


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """{name in the file: diffusers' name}. Names that nobody knows map to themselves: strict loading then lists them."""
    names = list(names)
    prefixes = _stage_prefixes(names)
    renamed: dict[str, str] = {}
    for name in names:
        match = _STAGE.match(name)
        if match is not None:
            renamed[name] = f"{prefixes[match.group(0)]}.{_leaf(name[match.end() :])}"
            continue
        module = max((known for known in vae.MODULES if name.startswith(f"{known}.")), key=len, default=None)
        rest = name if module is None else name[len(module) + 1 :]
        renamed[name] = name if module is None else f"{vae.MODULES[module]}.{_leaf(rest)}"
    return renamed


def _leaf(name: str) -> str:
    module = next((known for known in vae.LEAVES if name.startswith(f"{known}.")), None)
    return name if module is None else vae.LEAVES[module] + name[len(module) :]


def _stage_prefixes(names: list[str]) -> dict[str, str]:
    encoder, decoder = levels(names, "encoder"), levels(names, "decoder")
    nested = is_nested((encoder, decoder))
    found: dict[str, str] = {}
    row = 0
    for number, level in enumerate(encoder):
        for position, stage in enumerate(level):
            inside = "downsampler" if stage.resamples else f"resnets.{position}"
            found[stage.prefix] = f"encoder.down_blocks.{number}.{inside}" if nested else f"encoder.down_blocks.{row}"
            row += 1
    for number, level in enumerate(decoder):
        for position, stage in enumerate(level):
            resampling = "upsampler" if nested else "upsamplers.0"
            inside = resampling if stage.resamples else f"resnets.{position}"
            found[stage.prefix] = f"decoder.up_blocks.{number}.{inside}"
    return found


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of AutoencoderKLWan for the file with these shapes.

    Raises:
        KeyError: a tensor that every Wan VAE has is missing.
        ValueError: latent channels whose statistics nobody published.
    """
    channels = shapes["conv2.weight"][0]
    if channels not in vae.LATENT_STATISTICS:
        raise ValueError(
            f"{channels} latent channels, whose mean and deviation the file does not hold; known are those of "
            f"{', '.join(map(str, vae.LATENT_STATISTICS))}: use a diffusers folder, whose config.json says them"
        )
    encoder = levels(shapes, "encoder")
    if not encoder:
        raise KeyError("encoder.downsamples.0")
    width, pixels = shapes["encoder.conv1.weight"][:2]
    multiples = [shapes[f"{level[0].prefix}residual.2.weight"][0] // width for level in encoder]
    patch = _PATCHES.get(pixels)
    mean, std = vae.LATENT_STATISTICS[channels]
    temporal = [f"{level[-1].prefix}time_conv.weight" in shapes for level in encoder[:-1]]
    return {
        "base_dim": width,
        "decoder_base_dim": shapes["decoder.conv1.weight"][0] // multiples[-1],
        "z_dim": channels,
        "dim_mult": multiples,
        "num_res_blocks": sum(not stage.resamples for stage in encoder[0]),
        "temperal_downsample": temporal,
        "latents_mean": list(mean),
        "latents_std": list(std),
        "is_residual": is_nested((encoder,)),
        "in_channels": pixels,
        "out_channels": shapes["decoder.head.2.weight"][0],
        "patch_size": patch,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": math.prod([2] * (len(encoder) - 1)) * (patch or 1),
    }
