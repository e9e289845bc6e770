"""Where the parts beside a network lie: VAE, text encoder, tokenizer, image encoder. No torch here.

A part is a folder as diffusers and transformers write it, a file as the official Wan folders hold it (formats.md, section 2), or
a hub id. Wherever a folder is named that holds the part under its published name, that part is meant: the path of an official
folder or of a diffusers pipeline is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from turbotrain.checkpoint.header import (
    EXPERT_FOLDERS,
    PICKLE_SUFFIXES,
    WEIGHT_SUFFIXES,
    CheckpointProblem,
    read_safetensors_header,
    refuse_unsafe_pickle,
)

COMPONENTS = ("vae", "text_encoder", "tokenizer", "image_encoder")
# Where the text encoder computes, and what its weights are (`codecs.prompts`).
TEXT_DEVICES = ("auto", "stay", "visit", "stream", "cpu", "cuda")
TEXT_DTYPES = ("auto", "float32", "bfloat16", "int8")
# Official names first, then those of a diffusers pipeline.
PUBLISHED_NAMES: dict[str, tuple[str, ...]] = {
    "vae": ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "vae"),
    "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"),
    "tokenizer": ("google/umt5-xxl", "tokenizer"),
    "image_encoder": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "image_encoder"),
}
# The tiny codecs of small worlds travel with every checkpoint; Wan's 11 GB text encoder is referred to.
COPIED_UP_TO = 64 * 2**20
_NETWORK_FOLDERS = {name for pair in EXPERT_FOLDERS for name in pair}


def find_component(name: str, components: Mapping[str, str], checkpoint: Path) -> str:
    """Where a part lies: as it is named, else beside the checkpoint or beside the other parts, under its published name.

    A relative path is meant from the checkpoint folder (or from the folder above an expert).

    Raises:
        ValueError: nobody names the part and it lies nowhere near, or a relative path is named that is not there.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    value = components.get(name)
    if not value:
        for place in _beside(folder, components):
            found = published_part(name, place)
            if found is not None:
                return str(found)
        raise ValueError(
            f"{checkpoint} names no {name}: say {name}=PATH, a folder or an official file (its metadata may record it when it is "
            "exported)"
        )
    place = _existing(value, folder)
    if place is not None:
        return str(published_part(name, place) or place)
    looks_like_hub_id = (
        value.count("/") == 1 and not value.startswith((".", "/")) and not value.endswith(WEIGHT_SUFFIXES)
    )
    if looks_like_hub_id:
        return value
    raise ValueError(
        f"{name} = {value!r}: not found beside {checkpoint}; say {name}=PATH, a folder or an official file"
    )


def published_part(name: str, folder: Path) -> Path | None:
    """The part inside `folder` under one of its published names; None where there is none."""
    if not folder.is_dir():
        return None
    return next((folder / known for known in PUBLISHED_NAMES[name] if (folder / known).exists()), None)


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _existing(value: str, folder: Path) -> Path | None:
    named = Path(value).expanduser()
    # The checkpoint's own folder comes before the working directory: a stray ./vae must not win.
    bases = () if named.is_absolute() else (folder, folder / "high", folder.parent)
    return next((place for place in (*(base / value for base in bases), named) if place.exists()), None)


def _beside(folder: Path, components: Mapping[str, str]) -> Iterator[Path]:
    """Where a part that nobody names may lie."""
    yield folder
    if folder.name in _NETWORK_FOLDERS:
        yield folder.parent
    for value in components.values():
        place = _existing(value, folder)
        if place is not None:
            yield place if place.is_dir() else place.parent


def check_component(name: str, place: str) -> None:
    """What a look at the file itself tells of a part; folders are left to their libraries.

    Raises:
        CheckpointProblem: no weights file, truncated, or a pickle that would run code.
    """
    path = Path(place).expanduser()
    if not path.is_file():
        return
    try:
        if path.suffix in PICKLE_SUFFIXES:
            refuse_unsafe_pickle(path)
        elif path.suffix == ".safetensors":
            read_safetensors_header(path)
        else:
            raise CheckpointProblem(f"{path}: no weights file (known are {', '.join(WEIGHT_SUFFIXES)})")
    except CheckpointProblem as problem:
        raise CheckpointProblem(f"{name}: {problem}") from problem
