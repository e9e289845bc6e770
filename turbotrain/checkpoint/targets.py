"""Where a conversion writes, and what it writes beside the weights. Checked before anything is read; no torch here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from turbotrain.checkpoint.header import CheckpointProblem
from turbotrain.checkpoint.keymaps.targets import TARGETS, Target
from turbotrain.model.variants import WanConfig


def check_output(sources: Iterable[Path], output: Path, target: Target, experts: int, force: bool) -> None:
    """Raises CheckpointProblem when `output` cannot be written, exists (`force` replaces it) or would replace a source."""
    if target.suffix and experts == 1 and output.suffix != target.suffix:
        raise CheckpointProblem(f"{output}: {target.label} is one {target.suffix} file; name the output so")
    is_folder = not target.suffix or experts == 2
    if is_folder and output.suffix in (".pth", ".safetensors"):
        what = "with two experts is a folder of two files" if target.suffix else "is a folder"
        raise CheckpointProblem(f"{output}: {target.label} {what}; name the output without {output.suffix}")
    if output.exists():
        if output.is_dir() != is_folder:
            raise CheckpointProblem(f"{output}: is a {'folder' if output.is_dir() else 'file'}; name another output")
        for source in sources:
            place, goal = source.expanduser().resolve(), output.resolve()
            if goal == place or goal in place.parents:
                raise CheckpointProblem(f"{output}: would replace {source}, which is read; name another output")
        if not force and (not is_folder or any(output.iterdir())):
            raise CheckpointProblem(f"{output}: exists; --force replaces it")
    parent = _existing(output)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointProblem(f"{output}: {parent} is no folder that can be written to; name another output")


def check_space(output: Path, nbytes: int) -> None:
    """Raises CheckpointProblem when the disk has no room for `nbytes` more."""
    free = shutil.disk_usage(_existing(output)).free
    if free < nbytes:
        raise CheckpointProblem(f"{output}: needs {nbytes / 2**30:.1f} GiB, its disk has {free / 2**30:.1f} GiB left")


def _existing(output: Path) -> Path:
    """The nearest place above `output` that exists."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def place_of(expert: str, target: Target) -> str:
    """The name of a network's folder or file within the output ("" the output itself); expert: "", "high" or "low"."""
    name = target.names[("", "high", "low").index(expert)]
    return name + target.suffix if name else name


def written_places(output: Path, layout: str, experts: Iterable[str]) -> dict[str, Path]:
    """{expert: where its network lies} once `output` is written."""
    return {expert: output / place_of(expert, TARGETS[layout]) for expert in experts}


def config_json(config: WanConfig, layout: str) -> dict[str, Any]:
    """The config.json of an official or diffusers folder."""
    if layout == "official":
        return {
            "_class_name": "WanModel",
            "model_type": config.model_type,
            "text_len": config.text_len,
            "in_dim": config.in_channels,
            "dim": config.dim,
            "ffn_dim": config.ffn_dim,
            "freq_dim": config.freq_dim,
            "out_dim": config.out_channels,
            "num_heads": config.num_heads,
            "num_layers": config.num_layers,
            "eps": config.eps,
        }
    said = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": config.image_dim,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "rope_max_seq_len": 1024,
    }
    # diffusers has no such field and always pads to 512; what other lengths a network was trained with is kept for ours.
    return said if config.text_len == 512 else {**said, "text_len": config.text_len}
