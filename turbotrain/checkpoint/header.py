"""What can be known about checkpoint files without torch, so that a bad one is refused within a second.

safetensors begin with the length of a JSON header (8 bytes, little endian), then the header, then exactly the bytes that
its offsets name: a truncated file gives itself away by its size. A torch pickle is scanned opcode by opcode, never run:
every name it would import must be one that rebuilding tensors needs. The scan is an early, readable refusal; the guarantee
is `torch.load(weights_only=True)` in io.py.
"""

from __future__ import annotations

import dataclasses
import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turbotrain.checkpoint.keymaps import scaled

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
# Two-expert models: our folders, the official ones, and those of a diffusers pipeline; high-noise expert first.
EXPERT_FOLDERS = (("high", "low"), ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
_EXPERT_FILES = (r"(?<![a-z])high(?![a-z])", r"(?<![a-z])low(?![a-z])")
_OTHER_FILES = re.compile(r"vae|t5|clip")
INDEX_SUFFIX = ".safetensors.index.json"
AGAIN = "copy or download it again"
_MAX_HEADER = 100_000_000
_SAFE_GLOBALS = {
    "collections": ("OrderedDict",),
    "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"),
    "torch._tensor": ("_rebuild_from_type_v2",),
    "torch.nn.parameter": ("Parameter",),
    "torch.storage": ("TypedStorage", "UntypedStorage"),
    "torch": (
        *("Size", "Tensor", "device", "bool", "uint8", "int8", "int16", "int32", "int64"),
        *("bfloat16", "float16", "float32", "float64", "float8_e4m3fn"),
    ),
}


class CheckpointProblem(ValueError):
    """A file or folder that cannot be loaded as a checkpoint: which, why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Glimpse:
    """What the headers say.

    metadata: the `turbotrain` JSON of the first weights file, None for files of other projects.
    shapes: tensor shapes by key, of all safetensors; empty for pickles. weights: the files that hold weights.
    config: the config.json beside the weights ({} without one).
    """

    metadata: dict[str, Any] | None
    shapes: dict[str, tuple[int, ...]]
    weights: list[Path]
    config: dict[str, Any]


def expert_folders(folder: Path) -> tuple[Path, Path] | None:
    """(high, low) when `folder` holds a two-expert model, else None.

    Two folders with one of the known pairs of names, or two weights files, one called high and one low, with at most VAEs and
    text encoders beside them.
    """
    for names in EXPERT_FOLDERS:
        high, low = (folder / name for name in names)
        if high.is_dir() and low.is_dir():
            return high, low
    listed = folder.iterdir() if folder.is_dir() else ()
    files = [file for file in listed if file.suffix in WEIGHT_SUFFIXES and not _OTHER_FILES.search(file.stem.lower())]
    marked = [[file for file in files if re.search(sign, file.stem.lower())] for sign in _EXPERT_FILES]
    if len(files) == 2 and [len(found) for found in marked] == [1, 1] and marked[0] != marked[1]:
        return marked[0][0], marked[1][0]
    return None


def find_weights(path: str | Path) -> list[Path]:
    """The files that hold one transformer's weights, shards in order.

    path: a weights file, a shard index, a folder with one of these, or one with a `transformer/` folder (diffusers).
    Raises CheckpointProblem: nothing there, shards missing, or two experts (the message names both folders).
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.name.endswith(INDEX_SUFFIX):
            return _shards(path)
        if path.suffix not in WEIGHT_SUFFIXES:
            raise CheckpointProblem(
                f"{path}: {path.suffix!r} is no weights file; known are {', '.join(WEIGHT_SUFFIXES)}"
            )
        return [path]
    if not path.is_dir():
        raise CheckpointProblem(f"{path} does not exist; name a checkpoint folder, a .safetensors or a .pth file")
    experts = expert_folders(path)
    if experts is not None:
        high, low = experts
        raise CheckpointProblem(f"{path} holds two experts; load {high} (high noise) or {low} (low noise)")
    index = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if index:
        return _shards(index[0])
    found = sorted(file for file in path.iterdir() if file.suffix == ".safetensors")
    found = found or sorted(file for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if [file.name for file in found] == ["dataset.safetensors"]:  # what lies beside shards (turbotrain.data.shards)
        raise CheckpointProblem(f"{path}: training data, no network; name a checkpoint that a training stage wrote")
    if len(found) == 1:
        return found
    if found:
        names = ", ".join(file.name for file in found)
        raise CheckpointProblem(f"{path}: several weights files and no shard index ({names}); name one of them")
    if (path / "transformer").is_dir():
        return find_weights(path / "transformer")
    lone = [path / name for pair in EXPERT_FOLDERS[:2] for name in pair if (path / name).is_dir()]
    hint = f"; a two-expert checkpoint needs two folders, but there is only {lone[0].name}/" if lone else ""
    # A run folder, or a stage's: the network lies further in.
    inner = {file.parent for pattern in ("", "*/") for file in path.glob(f"{pattern}checkpoint/model*.safetensors")}
    hint = f" Did you mean {' or '.join(str(folder) for folder in sorted(inner))}?" if inner else hint
    raise CheckpointProblem(f"{path}: no {', '.join(WEIGHT_SUFFIXES)} file inside; is it a checkpoint folder?{hint}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointProblem(f"{index}: not a readable shard index; {AGAIN}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointProblem(f"{index.parent}: shards missing: {', '.join(missing)}; copy or download them again")
    return [index.parent / name for name in names]


def inspect_checkpoint(path: str | Path) -> Glimpse:
    """The headers of a checkpoint (of both experts, where there are two; the shapes are then of the low-noise one).

    Raises CheckpointProblem: missing, truncated, no checkpoint, damaged metadata, or a pickle that would run code.
    """
    path = Path(path).expanduser()
    places = expert_folders(path) or [path]
    metadata: dict[str, Any] | None = None
    shapes: dict[str, tuple[int, ...]] = {}
    weights = [file for place in places for file in find_weights(place)]
    for file in weights:
        if file.suffix in PICKLE_SUFFIXES:
            refuse_unsafe_pickle(file)
            continue
        header = read_safetensors_header(file)
        metadata = metadata or turbotrain_metadata(file, header)
        shapes.update({key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"})
    return Glimpse(metadata, shapes, weights, read_config(weights[0].parent))


def check_checkpoint(path: str | Path, variant: str | None = None) -> Glimpse:
    """`inspect_checkpoint`, and that the network is `variant`'s (pickles show their dimensions only when they are loaded).

    Raises CheckpointProblem that names what was found and what was expected.
    """
    from turbotrain.checkpoint import layouts  # here: it needs this module's error
    from turbotrain.model.variants import VARIANTS, WanConfig

    glimpse = inspect_checkpoint(path)
    if variant is None or not glimpse.shapes:
        return glimpse
    expected = VARIANTS[variant].config
    if glimpse.metadata and glimpse.metadata.get("config"):
        found = WanConfig.from_dict(glimpse.metadata["config"])
    else:
        names = layouts.native_names(glimpse.shapes, str(path))
        shapes = {native: glimpse.shapes[name] for name, native in names.items()}
        found = layouts.infer_config(shapes, layouts.config_hints(glimpse.config), str(path))
    if found != expected:
        raise CheckpointProblem(
            f"{path} holds {layouts.describe(found)}, but variant={variant} expects {layouts.describe(expected)}; "
            "name another checkpoint or the variant that fits"
        )
    return glimpse


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of official and diffusers folders; {} without one. Raises CheckpointProblem when it is damaged."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointProblem(f"{file}: not readable JSON; {AGAIN}") from error
    return config if isinstance(config, dict) else {}


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file whose size agrees with it. Raises CheckpointProblem when it does not."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointProblem(f"{path}: truncated or not a safetensors file ({size} bytes); {AGAIN}")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointProblem(f"{path}: its safetensors header is damaged; {AGAIN}") from error
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise CheckpointProblem(f"{path}: {state}, {size} bytes where its header says {expected}; {AGAIN}")
    formats = (header.get("__metadata__") or {}).get("_quantization_metadata")
    if formats is not None:
        _refuse_unreadable_formats(formats, str(path))
    return header


def _refuse_unreadable_formats(text: str, source: str) -> None:
    """ComfyUI may say in a file's metadata how each layer is quantized."""
    try:
        layers = json.loads(text)["layers"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointProblem(f"{source}: its _quantization_metadata are not readable; {AGAIN}") from error
    for layer, said in layers:
        refuse_unreadable_format(layer, said, source)


def refuse_unreadable_format(layer: str, said: Any, source: str) -> None:
    """Raises CheckpointProblem for layers that are stored rotated or packed: names and shapes may look like plain int8.

    said: what ComfyUI writes beside a quantized layer, {"format": ..., ...}.
    """
    if not isinstance(said, dict) or said.get("format") not in scaled.FORMATS or said.get("convrot"):
        raise CheckpointProblem(
            f"{source}: {layer} is quantized as {said}; only {', '.join(scaled.FORMATS)} without rotation are read: export the "
            "file in one of these, or in bf16"
        )


def turbotrain_metadata(path: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """What turbotrain wrote into a safetensors header; None for files of other projects."""
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


def refuse_unsafe_pickle(path: Path) -> None:
    """Raises CheckpointProblem when a torch pickle is damaged or names anything but what rebuilding tensors needs."""
    remedy = "convert it to safetensors where you trust it, or get it from its publisher again"
    try:
        unsafe = [(module, name) for module, name in _pickle_globals(path) if not _is_safe(module, name)]
    except (
        Exception
    ) as error:  # a damaged pickle fails in zipfile and pickletools in many ways, which all mean the same
        raise CheckpointProblem(f"{path}: truncated or not a torch checkpoint; {remedy}") from error
    if unsafe:
        called = ", ".join(sorted({f"{module}.{name}" for module, name in unsafe}))
        raise CheckpointProblem(f"{path}: refused, because loading this pickle would run {called}; {remedy}")


def _is_safe(module: str, name: str) -> bool:
    return name in _SAFE_GLOBALS.get(module, ()) or (module == "torch" and name.endswith("Storage"))


def _pickle_globals(path: Path) -> Iterator[tuple[str, str]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if not pickles:
                raise ValueError("no pickle inside")
            for name in pickles:
                yield from _globals_of(archive.read(name))
        return
    with open(path, "rb") as file:
        if file.peek(1)[:1] != b"\x80":
            raise ValueError("not a pickle")
        for _ in range(
            5
        ):  # the format before torch 1.6: magic, version, system, data and storage keys, one pickle each
            if not file.peek(1):
                return
            yield from _globals_of(file)


def _globals_of(pickle: Any) -> Iterator[tuple[str, str]]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name == "STACK_GLOBAL":
            yield (strings[-2], strings[-1]) if len(strings) > 1 else ("?", "?")
        elif isinstance(argument, str) and "UNICODE" in opcode.name:
            strings.append(argument)
