"""Checkpoint files written a tensor at a time: safetensors, in shards if need be, and the zip container of torch.save.

What each file will hold is known before its first byte, so a writer has one tensor in memory, whatever the size of a shard.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from turbotrain.checkpoint.header import INDEX_SUFFIX, CheckpointProblem
from turbotrain.checkpoint.stream import DTYPES, Entry, is_floating, itemsize

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 2**22  # numbers that are looked at together
# The storage types that torch files name; its newer dtypes are written in another way, and no such checkpoint exists.
STORAGES = {
    **{"float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"},
    **{
        "int64": "LongStorage",
        "int32": "IntStorage",
        "int16": "ShortStorage",
        "int8": "CharStorage",
        "uint8": "ByteStorage",
    },
    "bool": "BoolStorage",
}
_ALIGNMENT = 64  # of tensors in torch files, so that they can be mapped


def write_safetensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """One safetensors file. Raises CheckpointProblem for values that are not finite; OSError."""
    ordered = sorted(entries.items(), key=lambda item: -itemsize(item[1].dtype))  # aligned without gaps
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in ordered:
        begin, end = end, end + entry.nbytes
        described[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, entry in ordered:
            file.write(_data(name, entry))


def write_shards(
    folder: Path, stem: str, entries: Mapping[str, Entry], metadata: Mapping[str, str], max_bytes: int
) -> list[Path]:
    """`stem.safetensors`, or shards of at most `max_bytes` (a larger tensor gets its own) with their index."""
    sizes = {name: entry.nbytes for name, entry in entries.items()}

    def write(path: Path, names: list[str]) -> None:
        write_safetensors(path, {name: entries[name] for name in names}, metadata)

    return in_shards(folder, stem, sizes, max_bytes, write)


def in_shards(
    folder: Path, stem: str, sizes: Mapping[str, int], max_bytes: int, write: Callable[[Path, list[str]], None]
) -> list[Path]:
    """Files of tensors of `sizes` in bytes: one, or several with an index; `write` is given each path and the names in it."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) == 1:
        files = [folder / f"{stem}.safetensors"]
    else:
        files = [
            folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]
        weight_map = {name: file.name for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=1))
    for file, names in zip(files, shards):
        write(file, names)
    return files


class _Storage:
    """Stands for a storage while its tensor is pickled."""

    def __init__(self, dtype: str, key: str, count: int) -> None:
        self.reference = ("storage", getattr(torch, STORAGES[dtype]), key, "cpu", count)


class _Saved:
    """Pickles as the tensor that a torch file rebuilds from a storage."""

    def __init__(self, entry: Entry, key: str) -> None:
        stride = tuple(math.prod(entry.shape[place + 1 :]) for place in range(len(entry.shape)))
        storage = _Storage(entry.dtype, key, math.prod(entry.shape))
        self.arguments = (storage, 0, entry.shape, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return _rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, _Storage) else None


def write_pickle(path: Path, entries: Mapping[str, Entry]) -> None:
    """A flat state dict as torch.save writes it: torch.load reads and maps it.

    Raises CheckpointProblem for values that are not finite and for dtypes that such files do not name; OSError.
    """
    for name, entry in entries.items():
        if entry.dtype not in STORAGES:
            raise CheckpointProblem(
                f"{name}: {entry.dtype} has no place in a torch file of this kind; choose safetensors"
            )
    described = io.BytesIO()
    _Pickler(described, protocol=2).dump(
        {name: _Saved(entry, str(key)) for key, (name, entry) in enumerate(entries.items())}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, "data.pkl", described.getvalue())
        _record(archive, "byteorder", b"little")
        for key, (name, entry) in enumerate(entries.items()):
            _record(archive, f"data/{key}", _data(name, entry))
        _record(archive, "version", b"3\n")


def _record(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Add a stored file whose data begin at a multiple of 64: an extra field pads its header."""
    info = zipfile.ZipInfo(f"archive/{name}")
    large = len(data) * 1.05 > zipfile.ZIP64_LIMIT
    assert archive.fp is not None
    begin = archive.fp.tell() + 30 + len(info.filename) + 4 + (20 if large else 0)
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4250, padding) + bytes(padding)
    info.file_size = len(data)
    with archive.open(info, "w", force_zip64=large) as file:
        file.write(data)


def _data(name: str, entry: Entry) -> memoryview:
    """The bytes of a tensor, which must be what was announced, and finite."""
    tensor = entry.read()
    if tuple(tensor.shape) != entry.shape or str(tensor.dtype) != f"torch.{entry.dtype}":
        raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} instead of {entry.dtype} {entry.shape}")
    refuse_non_finite(name, tensor)
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def refuse_non_finite(name: str, tensor: Tensor) -> None:
    """Raises CheckpointProblem when a value is infinite or not a number."""
    if not is_floating(str(tensor.dtype)):
        return
    for part in tensor.reshape(-1).split(_CHUNK):
        if not torch.isfinite(part if part.itemsize > 1 else part.float()).all():
            raise CheckpointProblem(f"{name}: holds values that are not finite; get the checkpoint again")
