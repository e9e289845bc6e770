"""What can be known about checkpoint files without torch: so that a bad one is refused within a second.

safetensors begin with the length of a JSON header (8 bytes, little endian), then the header, then exactly the bytes that the
header's offsets name: a truncated file gives itself away by its size. A torch pickle is scanned opcode by opcode, never run:
every name that it would import must be one that rebuilding tensors needs. This is a quick and readable refusal; the guarantee is
`torch.load(weights_only=True)` in `turbotrain.checkpoint.io`.
"""

from __future__ import annotations

import json
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
EXPERTS = ("high", "low")
_SAFE_MODULES = ("torch", "torch.storage", "torch._utils", "torch._tensor", "torch.nn.parameter", "collections", "numpy")
_SAFE_NAMES = {
    "collections": {"OrderedDict"},
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch.nn.parameter": {"Parameter"},
    "torch.storage": {"TypedStorage", "UntypedStorage"},
    "numpy": {"dtype"},
}
_MAX_HEADER = 100_000_000


class CheckpointProblem(ValueError):
    """A file or folder that cannot be loaded as a checkpoint: which, why, and what to do."""


@dataclass(frozen=True)
class Glimpse:
    """What the headers say.

    Attributes:
        metadata: the `turbotrain` JSON of the (first) weights file, None for files of other projects.
        shapes: tensor shapes by key of all safetensors seen; empty for pickles.
        weights: the files that hold weights.
    """

    metadata: dict[str, Any] | None
    shapes: dict[str, tuple[int, ...]]
    weights: list[Path] = field(default_factory=list)


def inspect_checkpoint(path: str | Path) -> Glimpse:
    """Headers of a checkpoint: a folder (also with `high/` and `low/`), a `.safetensors` file or a torch pickle.

    Raises:
        CheckpointProblem: missing, truncated, not a checkpoint, metadata that is not JSON, or a pickle that would run code.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointProblem(f"{path} does not exist; name a checkpoint folder, a .safetensors file or a .pth file")
    files = [path] if path.is_file() else _weights_in(path)
    metadata: dict[str, Any] | None = None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            header = read_safetensors_header(file)
            found = _turbotrain_metadata(file, header)
            metadata = metadata or found
            shapes.update({key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"})
        elif file.suffix in PICKLE_SUFFIXES:
            refuse_unsafe_pickle(file)
        else:
            raise CheckpointProblem(f"{file}: suffix {file.suffix!r} is no checkpoint; known: {', '.join(WEIGHT_SUFFIXES)}")
    return Glimpse(metadata, shapes, files)


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file whose size agrees with it. Raises CheckpointProblem when it does not."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointProblem(f"{path}: truncated or not a safetensors file ({size} bytes); copy or download it again")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointProblem(f"{path}: its safetensors header is damaged; copy or download it again") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointProblem(f"{path}: truncated, {size} bytes where its header says {expected}; copy or download it again")
    return header


def refuse_unsafe_pickle(path: Path) -> None:
    """Raises CheckpointProblem when a torch pickle is damaged or names anything but what rebuilding tensors needs."""
    remedy = "convert it to safetensors where you trust it, or get it from its publisher again"
    try:
        for module, name in _pickle_imports(path):
            allowed = _SAFE_NAMES.get(module)
            if module == "torch":
                safe = name.endswith("Storage") or name.islower() or name in ("Size", "Tensor")  # torch.float32, torch.device
            else:
                safe = module in _SAFE_MODULES and allowed is not None and name in allowed
            if not safe:
                raise CheckpointProblem(f"{path}: refused, because loading this pickle would call {module}.{name}; {remedy}")
    except CheckpointProblem:
        raise
    except Exception as error:  # a damaged pickle fails in pickletools in many ways, and all of them mean the same
        raise CheckpointProblem(f"{path}: truncated or not a torch checkpoint; {remedy}") from error


def _pickle_imports(path: Path) -> Iterator[tuple[str, str]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".pkl")]
            if not names:
                raise ValueError("no pickle inside")
            for name in names:
                yield from _globals(archive.read(name))
        return
    with open(path, "rb") as file:
        if file.read(2)[:1] != b"\x80":
            raise ValueError("not a pickle")
        file.seek(0)
        for _ in range(5):  # torch's format before 1.6: magic, version, system, data and storage keys, one pickle each
            if not file.peek(1):
                return
            yield from _globals(file)


def _globals(pickle: Any) -> Iterator[tuple[str, str]]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name == "STACK_GLOBAL":
            yield (strings[-2], strings[-1]) if len(strings) > 1 else ("?", "?")
        elif isinstance(argument, str) and "UNICODE" in opcode.name:
            strings.append(argument)


def _weights_in(folder: Path) -> list[Path]:
    experts = [folder / name for name in EXPERTS if (folder / name).is_dir()]
    if len(experts) == 1:
        raise CheckpointProblem(f"{folder}: has {experts[0].name}/ only; a two-expert checkpoint needs high/ and low/")
    places = experts or [folder]
    files: list[Path] = []
    for place in places:
        index = sorted(place.glob("*.safetensors.index.json"))
        if index:
            try:
                names = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise CheckpointProblem(f"{index[0]}: not a readable shard index; copy or download it again") from error
            missing = [name for name in names if not (place / name).is_file()]
            if missing:
                raise CheckpointProblem(f"{place}: shards missing: {', '.join(missing)}; copy or download them again")
            found = [place / name for name in names]
        else:
            found = sorted(file for file in place.glob("*") if file.suffix == ".safetensors")
            found = found or sorted(file for file in place.glob("*") if file.suffix in PICKLE_SUFFIXES)
        if not found:
            nested = sorted(str(file.parent.relative_to(folder)) for file in place.glob("*/*.safetensors"))
            hint = f" (weights are in {', '.join(dict.fromkeys(nested))}/: name that folder)" if nested else ""
            raise CheckpointProblem(f"{place}: no {', '.join(WEIGHT_SUFFIXES)} file inside; is this a checkpoint folder?{hint}")
        files += found
    return files


def _turbotrain_metadata(path: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    text = (header.get("__metadata__") or {}).get("turbotrain")
    if text is None:
        return None
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise CheckpointProblem(f"{path}: its turbotrain metadata is not JSON; export the checkpoint again") from error
    if not isinstance(metadata, dict):
        raise CheckpointProblem(f"{path}: its turbotrain metadata is no JSON object; export the checkpoint again")
    return metadata
