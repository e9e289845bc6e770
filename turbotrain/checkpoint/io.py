"""Checkpoint files in and out, and networks built from them.

The only place that reads pickles, by `torch.load(weights_only=True)`. Everything is written whole or not at all (atomic.py):
a killed process or a full disk leaves the old state or the new one.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turbotrain.checkpoint import header, identify, layouts
from turbotrain.checkpoint.atomic import new_folder
from turbotrain.checkpoint.header import CheckpointProblem
from turbotrain.checkpoint.meta import METADATA_KEY, CheckpointMeta
from turbotrain.checkpoint.sinks import in_shards
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import dequantize_model, from_disk_names, prepare_quantized, to_disk_names
from turbotrain.model.variants import WanConfig
from turbotrain.model.wan import FLOAT32_ISLANDS, WanTransformer

STEM = "model"  # of the names of weights files
MAX_SHARD_BYTES = 10 * 2**30


# ---- reading ------------------------------------------------------------------------------------------------------------


def read_tensors(path: str | Path, *, mmap: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint under the names in its files, on the CPU. mmap: pickles stay in the file until they are used.

    Raises CheckpointProblem: nothing there, truncated, shards missing, or a pickle that holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in header.find_weights(path):
        tensors.update(_read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file, mmap=mmap))
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    header.read_safetensors_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointProblem(f"{path}: {error}; {header.AGAIN}") from error


def read_pickle(path: Path, data: bool = True, *, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors of a torch file, at its top level or under state_dict, model or module.

    data=False: on the meta device, without their numbers; `untyped_storage()._checkpoint_offset` says where in the file these
    begin. mmap: they stay in the file until they are used.
    Raises CheckpointProblem: truncated, or more than tensors inside.
    """
    header.refuse_unsafe_pickle(path)
    # The format before torch 1.6 is no archive and cannot be mapped.
    state = _load_pickle(path, str(path), "cpu" if data else "meta", mmap=mmap and zipfile.is_zipfile(path))
    while isinstance(state, Mapping) and not any(isinstance(value, Tensor) for value in state.values()):
        nested = next((state[key] for key in ("state_dict", "model", "module") if key in state), None)
        if nested is None:
            raise CheckpointProblem(f"{path}: holds no tensors under its top level, state_dict, model or module")
        state = nested
    if not isinstance(state, Mapping):
        raise CheckpointProblem(
            f"{path}: holds a {type(state).__name__}, expected a state dict; convert it to safetensors"
        )
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _load_pickle(source: Path | io.BytesIO, name: str, device: str = "cpu", *, mmap: bool = False) -> Any:
    try:
        return torch.load(source, map_location=device, weights_only=True, mmap=mmap or None)
    except pickle.UnpicklingError as error:
        raise CheckpointProblem(
            f"{name}: refused, this pickle holds more than tensors ({str(error).splitlines()[0]}); convert it to safetensors "
            "where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointProblem(f"{name}: truncated or not a torch file; {header.AGAIN}") from error


def load_tensor(data: bytes, name: str) -> Tensor:
    """The one tensor in the bytes of a `.pt` file; `name` says where they come from. Raises CheckpointProblem."""
    tensor = _load_pickle(io.BytesIO(data), name)
    if not isinstance(tensor, Tensor):
        raise CheckpointProblem(f"{name}: holds a {type(tensor).__name__}, expected a tensor; build the shard again")
    return tensor


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> tuple[dict[str, Tensor], CheckpointMeta]:
    """(state dict under native names, what the checkpoint says about itself), for any layout of formats.md. mmap: `read_tensors`.

    Without our metadata the description is inferred from names, shapes and a config.json. 8-bit layers keep the names of the
    file: `X.int8_weight` or `X.fp8_weight`, `X.scale`, `X.bias`, `X.smooth`. Raises CheckpointProblem.
    """
    state = layouts.from_layout(read_tensors(path, mmap=mmap), str(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return state, _describe(path, shapes, _dtype_of(state))


def read_meta(path: str | Path) -> CheckpointMeta:
    """What a checkpoint says about itself, from its headers where they suffice. Raises CheckpointProblem."""
    if any(file.suffix != ".safetensors" for file in header.find_weights(path)):
        return read_checkpoint(path)[1]
    shapes = header.inspect_checkpoint(path).shapes
    if any(name.endswith(layouts.scaled.SCALES) for name in shapes):
        return read_checkpoint(path)[1]  # the scheme shows in dtypes
    names = layouts.native_names(shapes, str(path))
    return _describe(path, {native: shapes[name] for name, native in names.items()}, None)


def _describe(path: str | Path, shapes: dict[str, tuple[int, ...]], dtype: str | None) -> CheckpointMeta:
    glimpse = header.inspect_checkpoint(path)
    return identify.describe(path, shapes, glimpse.metadata, glimpse.config, dtype)


def _dtype_of(state: Mapping[str, Tensor]) -> str:
    return (
        str(state["patch_embedding.weight"].dtype).removeprefix("torch.") if "patch_embedding.weight" in state else ""
    )


# ---- networks -----------------------------------------------------------------------------------------------------------


def load_transformer(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attention: AttentionConfig | Mapping[str, Any] | None = None,
) -> WanTransformer:
    """The network of a checkpoint in any layout of formats.md.

    dtype: of the weights outside the float32 islands; None keeps the file's, and keeps 8-bit layers 8-bit, while a given
    dtype dequantizes them. attention: fields that override the checkpoint's attention; a P that it lacks starts at zero.
    Raises CheckpointProblem that lists missing and unexpected tensors; ValueError for a dtype or attention that cannot be.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: choose a floating dtype, or None to keep the file's")
    state, meta = read_checkpoint(path)
    own = AttentionConfig.from_dict(meta.attention)
    wanted = own if attention is None else attention
    wanted = wanted if isinstance(wanted, AttentionConfig) else AttentionConfig.from_dict(dict(wanted), own)

    model, state = _without_weights(path, state, meta)
    loaded = {name: _own_memory(_cast(name, tensor, dtype)) for name, tensor in state.items()}
    model.load_state_dict(loaded, strict=True, assign=True)
    if dtype is not None:
        dequantize_model(model, dtype)
    return model.set_attention(wanted).to(device)


def map_transformer(path: str | Path) -> WanTransformer:
    """The network of a checkpoint, its weights still in the files and as they are there: for who copies them elsewhere, a tensor
    at a time. Nothing is read before it is used, and the pages that were read are shared by all processes of a machine.

    8-bit layers are multiplied out to float32 in memory. Raises CheckpointProblem, as `load_transformer` does.
    """
    state, meta = read_checkpoint(path, mmap=True)
    model, state = _without_weights(path, state, meta)
    model.load_state_dict(state, strict=True, assign=True)
    dequantize_model(model, torch.float32)
    return model


def _without_weights(
    path: str | Path, state: dict[str, Tensor], meta: CheckpointMeta
) -> tuple[WanTransformer, dict[str, Tensor]]:
    """The network on the meta device, and the state by the names that it expects, all of them."""
    try:
        with torch.device("meta"):
            model = WanTransformer(WanConfig.from_dict(meta.config), AttentionConfig.from_dict(meta.attention))
        state = from_disk_names(state)
        prepare_quantized(model, state)
    except ValueError as error:
        raise CheckpointProblem(f"{path}: {error}") from error
    _check_state(path, state, model)
    return model, state


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    parameter = name.rpartition(".")[2]
    if not tensor.is_floating_point() or parameter in ("weight_q", "scale", "smooth", "smooth_attn", "smooth_ffn"):
        return tensor
    if FLOAT32_ISLANDS.search(name) is not None:
        return tensor.to(torch.float64 if torch.float64 in (dtype, tensor.dtype) else torch.float32)
    if dtype is None and tensor.itemsize == 1:  # stored in fp8 without a scale: nothing multiplies in it
        dtype = torch.bfloat16
    return tensor if dtype is None else tensor.to(dtype)


def _own_memory(tensor: Tensor) -> Tensor:
    """A copy when the tensor is a view into a file: results must not depend on how a file happens to align its tensors."""
    aligned = (
        tensor.data_ptr() % 64 == 0 and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )
    return tensor if aligned and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _check_state(path: str | Path, state: Mapping[str, Tensor], model: WanTransformer) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    lines = [("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong)]
    found = "; ".join(f"{len(names)} {what}: {identify.shorten(names)}" for what, names in lines if names)
    if found:
        raise CheckpointProblem(f"{path}: does not fit {layouts.describe(model.config)}: {found}")


# ---- writing ------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    state_dict: Mapping[str, Tensor],
    meta: CheckpointMeta,
    components_from: Mapping[str, str | Path] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Turbo checkpoint folder, all of it or nothing: `model.safetensors` (or shards and an index) with `meta`.

    state_dict: a WanTransformer's, wrappers and all. components_from: {component: folder to copy in}, recorded in the
    metadata by relative path. An older checkpoint in `folder` is replaced.
    Raises OSError with the reason when the disk is full or read-only.
    """
    folder = Path(folder).expanduser().absolute()
    components = dict(components_from or {})
    meta = dataclasses.replace(meta, components={**meta.components, **{name: name for name in components}})
    named = to_disk_names({layouts.strip_wrappers(name): tensor for name, tensor in state_dict.items()})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    metadata = {METADATA_KEY: meta.to_json(), "format": "pt"}

    def write(path: Path, names: list[str]) -> None:
        save_file({name: tensors[name] for name in names}, path, metadata=metadata)

    with new_folder(folder) as temporary:
        in_shards(temporary, STEM, {name: tensor.nbytes for name, tensor in tensors.items()}, max_shard_bytes, write)
        for name, source in components.items():
            shutil.copytree(Path(source).expanduser(), temporary / name)
