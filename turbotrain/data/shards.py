"""What can be known about a folder of shards without torch, so that a bad one is refused before a stage begins.

The headers of the tar files name every member and its length, and the index beside them says how many samples of which shape
there should be.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turbotrain.checkpoint.header import CheckpointProblem, read_safetensors_header, turbotrain_metadata

INDEX_FILE = "dataset.safetensors"
PARTS = ("latent.pt", "embed.pt", "prompt.txt")
REBUILD = "build or copy the shard again"


class DatasetError(ValueError):
    """Shards that cannot be trained on: which file, what is wrong, and what to do."""


def check_shards(folder: Path, latent_shape: Sequence[int] | None = None) -> dict[str, Any]:
    """Check a data set by its headers; returns what its index says of it (count, latent_shape, ...).

    Raises:
        DatasetError: no folder, no shards or no index; a shard that is no tar, truncated, empty or lacks parts of a sample;
            another number of samples than was written; latents of another shape than `latent_shape`.
    """
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DatasetError(
            f"data: no *.tar shards in {folder}; run the data stage, or set data.path to a folder of shards"
        )
    facts = _read_index(folder / INDEX_FILE)
    expected, written = list(latent_shape or ()), list(facts.get("latent_shape") or ())
    if expected and written and expected != written:
        raise DatasetError(
            f"data: {folder} holds latents of shape {tuple(written)}, expected {tuple(expected)}; "
            "the shards were made for another resolution, length or VAE"
        )
    found = sum(_check_tar(shard) for shard in shards)
    if found != facts.get("count", found):
        raise DatasetError(
            f"data: {folder} holds {found} samples, {INDEX_FILE} says {facts['count']}: a shard is missing or damaged; "
            "copy or build the shards again"
        )
    return facts


def _read_index(index: Path) -> dict[str, Any]:
    if not index.is_file():
        raise DatasetError(f"data: {index} is missing; it holds the empty prompt's embedding. Build the shards again")
    try:
        return turbotrain_metadata(index, read_safetensors_header(index)) or {}
    except (CheckpointProblem, json.JSONDecodeError) as error:
        raise DatasetError(f"data: {index} cannot be read ({error}); build the shards again") from error


def _check_tar(shard: Path) -> int:
    """The number of samples in a whole shard. A streaming reader would take a truncated tar for a short one, so the last
    member is checked against the file's length."""
    try:
        with tarfile.open(shard, "r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DatasetError(f"data: {shard} is not a readable tar ({error}); {REBUILD}") from error
    if members and members[-1].offset_data + members[-1].size > shard.stat().st_size:
        raise DatasetError(f"data: {shard} is truncated in {members[-1].name}; {REBUILD}")
    samples: dict[str, set[str]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        key, _, part = name.partition(".")
        if member.isfile() and key and part:
            samples.setdefault(f"{folder}/{key}" if folder else key, set()).add(part)
    if not samples:
        raise DatasetError(f"data: {shard} holds no samples; remove it, or build the shards again")
    for key, parts in samples.items():
        missing = [part for part in PARTS if part not in parts]
        if missing:
            raise DatasetError(f"data: {shard}, sample {key}: no {', '.join(missing)}; {REBUILD}")
    return len(samples)
