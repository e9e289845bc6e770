"""The tensors of checkpoint files one at a time: what they are from the headers, their bytes when they are asked for.

Bytes are read into memory of the tensor's own size. Nothing stays mapped, so what a process holds is what it asked for. No
torch is imported before a pickle is opened or a tensor is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbotrain.checkpoint import header
from turbotrain.checkpoint.header import AGAIN, CheckpointProblem

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
# safetensors' names of dtypes, and torch's.
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
_BYTES = {"64": 8, "32": 4, "16": 2}


def itemsize(dtype: str) -> int:
    """Bytes of one number of a dtype, by torch's name of it."""
    return _BYTES.get(dtype[-2:], 1)


def is_floating(dtype: str) -> bool:
    return "float" in dtype


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor that is not in memory: shape, dtype (torch's name), and what brings it there (contiguous, on the CPU)."""

    shape: Shape
    dtype: str
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)

    def reshape(self, shape: Shape) -> Entry:
        """The same numbers in another shape of the same size."""
        return Entry(shape, self.dtype, lambda: self.read().reshape(shape))

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """An entry that hands out a tensor which is in memory already."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)


@dataclasses.dataclass(frozen=True)
class Contents:
    """One network's files: their tensors by the names they have there, our metadata (None without), config.json.

    whole: the file could not be read in parts (a torch file older than 1.6), so all of it is in memory.
    """

    files: list[Path]
    entries: dict[str, Entry]
    metadata: dict[str, Any] | None
    config: dict[str, Any]
    whole: bool = False


def open_contents(path: str | Path) -> Contents:
    """What one network's files hold: headers only (of an old torch file, everything).

    Raises CheckpointProblem: nothing there, truncated, shards missing or not as their index says, a tensor twice, a dtype that
    no network has, or a pickle that would run code.
    """
    path = Path(path).expanduser()
    files = header.find_weights(path)
    entries: dict[str, Entry] = {}
    metadata: dict[str, Any] | None = None
    place: dict[str, str] = {}
    whole = False
    for file in files:
        if file.suffix == ".safetensors":
            read = header.read_safetensors_header(file)
            metadata = metadata or header.turbotrain_metadata(file, read)
            found = _safetensors_entries(file, read)
        else:
            found, whole = _pickle_entries(file)
        twice = sorted(set(entries) & set(found))
        if twice:
            raise CheckpointProblem(f"{file}: holds {twice[0]}, as another shard does; {AGAIN}")
        entries.update(found)
        place.update(dict.fromkeys(found, file.name))
    _check_index(path, files, place)
    return Contents(files, entries, metadata, header.read_config(files[0].parent), whole)


def _check_index(path: Path, files: list[Path], place: Mapping[str, str]) -> None:
    indices = (
        [path] if path.name.endswith(header.INDEX_SUFFIX) else sorted(files[0].parent.glob(f"*{header.INDEX_SUFFIX}"))
    )
    if not indices or (path.is_file() and path not in indices):
        return
    said = json.loads(indices[0].read_text())["weight_map"]
    wrong = [name for name in sorted(set(said) | set(place)) if said.get(name) != place.get(name)]
    if wrong:
        name = wrong[0]
        raise CheckpointProblem(
            f"{indices[0]}: does not fit its shards: {len(wrong)} tensors are elsewhere than it says, {name} in "
            f"{place.get(name, 'none of them')} instead of {said.get(name, 'none')}; {AGAIN}"
        )


def _safetensors_entries(file: Path, read: Mapping[str, Any]) -> dict[str, Entry]:
    described = {name: entry for name, entry in read.items() if name != "__metadata__"}
    start = file.stat().st_size - max((entry["data_offsets"][1] for entry in described.values()), default=0)
    entries: dict[str, Entry] = {}
    for name, entry in described.items():
        dtype, shape = DTYPES.get(str(entry.get("dtype"))), tuple(entry["shape"])
        if dtype is None:
            raise CheckpointProblem(f"{file}: {name} has dtype {entry.get('dtype')}, which no known checkpoint uses")
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * itemsize(dtype):
            raise CheckpointProblem(f"{file}: its safetensors header is damaged at {name}; {AGAIN}")
        entries[name] = _file_entry(file, start + begin, shape, dtype)
    return entries


def _pickle_entries(file: Path) -> tuple[dict[str, Entry], bool]:
    header.refuse_unsafe_pickle(file)
    from turbotrain.checkpoint import io  # here: it imports torch

    described = io.read_pickle(file, data=False) if zipfile.is_zipfile(file) and _is_little_endian(file) else {}
    offsets = {name: _offset_of(tensor) for name, tensor in described.items()}
    if not offsets or None in offsets.values():
        return {name: Entry.of(tensor.detach().contiguous()) for name, tensor in io.read_pickle(file).items()}, True
    entries: dict[str, Entry] = {}
    for name, tensor in described.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES.values():
            raise CheckpointProblem(f"{file}: {name} has dtype {dtype}, which no known checkpoint uses")
        offset = offsets[name] + int(tensor.storage_offset()) * itemsize(dtype)
        entries[name] = _file_entry(file, offset, tuple(tensor.shape), dtype, tuple(tensor.stride()))
    return entries, False


def _offset_of(tensor: Any) -> Any:
    """Where in its file the storage of a tensor begins; None where torch does not say."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _is_little_endian(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        records = [name for name in archive.namelist() if name.endswith("/byteorder")]
        return all(archive.read(name) == b"little" for name in records)


def _file_entry(file: Path, offset: int, shape: Shape, dtype: str, stride: Shape | None = None) -> Entry:
    def read() -> Tensor:
        import torch

        kind = getattr(torch, dtype)
        count = math.prod(shape)
        if stride is not None and count:
            count = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
        data = torch.empty(count * itemsize(dtype), dtype=torch.uint8)
        with open(file, "rb") as source:
            source.seek(offset)
            got = source.readinto(data.numpy().data)
        if got != len(data):
            raise CheckpointProblem(f"{file}: ends within a tensor; {AGAIN}")
        flat = data.view(kind)
        return flat.reshape(shape) if stride is None else flat.as_strided(shape, stride).contiguous()

    return Entry(shape, dtype, read)
