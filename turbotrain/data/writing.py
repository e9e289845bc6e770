"""Shards as they are written: sample by sample, so that a process that was killed goes on where it stopped.

A shard grows under a hidden name and takes its own when it is complete. Each sample is appended by one write and flushed; a torn
one at the end is cut off when the work continues. The bytes depend on the samples alone, not on who wrote them or how often.

Legend: C channels, T latent frames, H, W latent height and width, L tokens, D their width.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from webdataset.writer import TarWriter

from turbotrain.checkpoint.atomic import new_file, new_folder
from turbotrain.checkpoint.io import load_tensor
from turbotrain.data.shards import CLIP, EMBED, IMAGE, INDEX_FILE, LATENT, PROMPT, DatasetError, Entry, scan_shard

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Sample:
    """One caption and what belongs to it; tensors are stored in float16.

    latent_CTHW: None where only prompts are kept. y_CTHW, clip_LD: image conditioning as `turbotrain.conditioning` makes it.
    """

    latent_CTHW: Tensor | None
    embed_LD: Tensor
    prompt: str
    y_CTHW: Tensor | None = None
    clip_LD: Tensor | None = None

    def members(self) -> dict[str, bytes]:
        """{part: bytes}."""
        tensors = {LATENT: self.latent_CTHW, EMBED: self.embed_LD, IMAGE: self.y_CTHW, CLIP: self.clip_LD}
        encoded = {part: _tensor_bytes(tensor) for part, tensor in tensors.items() if tensor is not None}
        return {**encoded, PROMPT: self.prompt.encode()}


class ShardFile:
    """A shard being written, by one process at a time. Leaving the block keeps what is there for the next attempt.

    parts: the members of every sample. `done`: keys of the samples that an earlier attempt wrote.

    Raises:
        DatasetError: another process is writing this shard.
    """

    def __init__(self, path: Path, parts: Sequence[str]) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.partial, "a+b")  # noqa: SIM115 (closed by __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise DatasetError(
                f"{path}: another process is writing this shard; give every worker a number of its own (--worker I/N)"
            ) from error
        entries = scan_shard(self.partial, parts)[0] if self.partial.stat().st_size else []
        self.done = {entry.key for entry in entries}
        ends = [first + -(-length // _BLOCK) * _BLOCK for entry in entries for first, length in entry.parts.values()]
        self._file.truncate(max(ends, default=0))

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample; it is on disk when this returns."""
        self._append(_encoded(key, members))
        self.done.add(key)

    def finish(self) -> None:
        """Close the archive and give it its name; a shard without samples is removed."""
        if not self.done:
            self.partial.unlink()
            return
        self._append(bytes(2 * _BLOCK))
        self._file.close()
        os.replace(self.partial, self.path)

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def write_shards(
    folder: Path, samples: Iterable[Sample], negative_LD: Tensor, samples_per_shard: int, source: dict[str, object]
) -> int:
    """Write a data set; the folder bears its name only when it is complete. Returns the number of samples.

    Args:
        negative_LD: embedding of the empty (negative) prompt.
        source: what the samples are, recorded as it is.
    """
    count, shard = 0, None
    with new_folder(folder) as new:
        for sample in samples:
            members = sample.members()
            if count % samples_per_shard == 0:
                if shard:
                    shard.finish()
                shard = ShardFile(new / f"train-{count // samples_per_shard:06d}.tar", tuple(members))
            assert shard is not None  # made for the first sample
            shard.write(f"{count:09d}", members)
            count += 1
        if shard:
            shard.finish()
        write_index(new, negative_LD, source)
    return count


def write_index(folder: Path, negative_LD: Tensor, source: Mapping[str, object]) -> dict[str, Any]:
    """Write `dataset.safetensors` for the shards that lie in `folder`; returns what it says of them.

    Raises:
        DatasetError: a shard that is damaged, or whose samples have other parts than those of the first.
    """
    shards: dict[str, dict[str, Any]] = {}
    parts: tuple[str, ...] = ()
    clip_shape = None
    for shard in sorted(folder.glob("*.tar")):
        parts = parts or _parts(shard)
        entries, problem, _ = scan_shard(shard, parts)
        if problem:
            raise DatasetError(problem)
        shards[shard.name] = {"count": len(entries)}
        if LATENT in parts:
            shards[shard.name]["latent_shape"] = _shape(entries[0], LATENT)
        if CLIP in parts:
            clip_shape = clip_shape or _shape(entries[0], CLIP)
    shapes = {tuple(shard.get("latent_shape", ())) for shard in shards.values()}
    facts = {
        "count": sum(shard["count"] for shard in shards.values()),
        "latent_shape": list(shapes.pop()) or None if len(shapes) == 1 else None,
        "embed_shape": list(negative_LD.shape),
        "clip_shape": clip_shape,
        "parts": parts,
        "shards": shards,
        **source,
    }
    with new_file(folder / INDEX_FILE) as new:
        negative = {"negative_embed": negative_LD.half().cpu().contiguous()}
        save_file(negative, new, metadata={"turbotrain": json.dumps(facts)})
    return facts


def _parts(shard: Path) -> tuple[str, ...]:
    """The members of the first sample."""
    entries, problem, _ = scan_shard(shard, ())
    if not entries:
        raise DatasetError(problem)
    with tarfile.open(shard, "r:") as archive:
        names = [Path(name).name.partition(".") for name in archive.getnames()]
    return tuple(part for key, _, part in names if key == names[0][0])


def _shape(entry: Entry, part: str) -> list[int]:
    first, length = entry.parts[part]
    with entry.shard.open("rb") as file:
        file.seek(first)
        return list(load_tensor(file.read(length), f"data: {entry.shard}, sample {entry.key}").shape)


def _encoded(key: str, members: Mapping[str, bytes]) -> bytes:
    """One sample as webdataset writes it, without the end of an archive. A fixed time: equal samples make equal shards."""
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0) as writer:
        writer.write({"__key__": key, **members})
    return buffer.getvalue()[: sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in members.values())]


def _tensor_bytes(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor.half().cpu().contiguous().clone(), buffer)
    return buffer.getvalue()
