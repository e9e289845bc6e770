"""The weights files of official Wan folders as transformers' and diffusers' modules.

Names are translated by the tables of `checkpoint/keymaps`, dimensions are read from the tensors, and loading is strict. A pickle
is mapped into memory, not copied: an 11 GB encoder that moves to a GPU passes through the page cache alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from turbotrain.checkpoint.header import CheckpointProblem
from turbotrain.checkpoint.io import read_tensors
from turbotrain.checkpoint.keymaps import clip, umt5
from turbotrain.codecs import official_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionModel, UMT5EncoderModel

CLIP_HEAD_DIM = 80  # of the published tower, ViT-H/14: 1280 features in 16 heads
_SHOWN = 8


def is_official_file(path: str | Path) -> bool:
    """A single file is meant as the official layout; folders and hub ids go to the libraries."""
    return Path(path).expanduser().is_file()


def load_umt5(path: str | Path, dtype: torch.dtype | None = None) -> UMT5EncoderModel:
    """`models_t5_umt5-xxl-enc-bf16.pth`, or one of other dimensions. dtype: None keeps the file's.

    Raises:
        CheckpointProblem: unreadable, unsafe, of another layout, or with missing or unexpected tensors, which it names.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    with _reading("text_encoder", path, "umT5 encoder"):
        tensors = read_tensors(path, mmap=True)
        vocabulary, width = _shape(tensors, "token_embedding.weight")
        buckets, heads = _shape(tensors, "blocks.0.pos_embedding.embedding.weight")
        config = UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=_shape(tensors, "blocks.0.attn.q.weight")[0] // heads,
            d_ff=_shape(tensors, "blocks.0.ffn.fc1.weight")[0],
            num_layers=_count(tensors, r"blocks\.(\d+)\."),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
        )
        state = _renamed(tensors, _translate(tensors, umt5.OFFICIAL_TO_TRANSFORMERS))
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
        encoder = _filled(lambda: UMT5EncoderModel(config), state, dtype)
        encoder.set_input_embeddings(encoder.shared)  # one parameter again: assigning made two of it
        return encoder


def load_vae(path: str | Path, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
    """`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, or one of their structure with other widths.

    Raises:
        CheckpointProblem: as `load_umt5`; also for latents of other than 16 or 48 channels.
    """
    from diffusers import AutoencoderKLWan

    with _reading("vae", path, "Wan VAE"):
        tensors = read_tensors(path, mmap=True)
        try:
            config = official_vae.infer_config({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        except (KeyError, IndexError) as error:
            raise _Foreign(str(error).strip("'"), tensors) from error
        state = _renamed(tensors, official_vae.diffusers_names(tensors))
        return _filled(lambda: AutoencoderKLWan(**config), state, dtype)


def load_clip(path: str | Path, dtype: torch.dtype | None = None) -> CLIPVisionModel:
    """The visual tower of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`.

    Raises:
        CheckpointProblem: as `load_umt5`.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with _reading("image_encoder", path, "CLIP image encoder"):
        tensors = read_tensors(path, mmap=True)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(clip.IGNORED)}
        width, _, _, patch = _shape(tensors, "visual.patch_embedding.weight")
        _, positions, _ = _shape(tensors, "visual.pos_embedding")
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=_shape(tensors, "visual.transformer.0.mlp.0.weight")[0],
            num_hidden_layers=_count(tensors, r"visual\.transformer\.(\d+)\."),
            num_attention_heads=max(1, width // CLIP_HEAD_DIM),
            image_size=math.isqrt(positions - 1) * patch,
            patch_size=patch,
            hidden_act="gelu",
        )
        _shape(tensors, "visual.cls_embedding")
        for name, shape in (("cls", (width,)), ("pos", (positions, width))):  # the file keeps dimensions of size 1
            tensors[f"visual.{name}_embedding"] = tensors[f"visual.{name}_embedding"].reshape(shape)
        state = _split_fused(_renamed(tensors, _translate(tensors, clip.OFFICIAL_TO_TRANSFORMERS)))
        tower = _filled(lambda: CLIPVisionModel(config), state, dtype)
        tower.embeddings.position_ids = torch.arange(positions)[None]  # not in the state dict: still without values
        return tower


class _Foreign(Exception):
    """A file of something else: it lacks what every file of the kind has."""

    def __init__(self, missing: str, names: Iterable[str]) -> None:
        some = ", ".join(list(names)[:4]) or "none"
        super().__init__(f"it has no tensor {missing} (its tensors begin: {some})")


@contextmanager
def _reading(field: str, path: str | Path, kind: str) -> Iterator[None]:
    try:
        yield
    except _Foreign as error:
        raise CheckpointProblem(f"{field}={str(path)!r}: not a {kind} in the official layout, {error}") from error
    except CheckpointProblem as error:
        raise CheckpointProblem(f"{field}: {error}") from error
    except ValueError as error:
        raise CheckpointProblem(f"{field}={str(path)!r}: {error}") from error


def _translate(names: Iterable[str], table: Mapping[str, str]) -> dict[str, str]:
    """{name in the file: name on `table`'s right side}; those that it does not know stay, so that strict loading lists them."""
    modules = sorted(table, key=len, reverse=True)
    patterns = [(re.compile(re.escape(module).replace(r"\{n\}", r"(?P<n>\d+)")), table[module]) for module in modules]
    renamed: dict[str, str] = {}
    for name in names:
        renamed[name] = name
        for pattern, target in patterns:
            match = pattern.match(name)
            if match is not None and name[match.end() :][:1] in ("", "."):
                renamed[name] = target.replace("{n}", match.groupdict().get("n", "")) + name[match.end() :]
                break
    return renamed


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Raises ValueError when two names mean the same tensor."""
    origin: dict[str, str] = {}
    for name in tensors:
        if names[name] in origin:
            raise ValueError(f"{origin[names[name]]} and {name} both mean {names[name]}; keep one of them")
        origin[names[name]] = name
    return {ours: tensors[name] for ours, name in origin.items()}


def _split_fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        before, fused, after = name.partition(clip.FUSED)
        if fused:
            for part, rows in zip(clip.FUSED_PARTS, tensor.chunk(3)):
                split[f"{before}{part}{after}"] = rows
        else:
            split[name] = tensor
    return split


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise _Foreign(name, state)
    return tuple(state[name].shape)


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max(int(match.group(1)) for name in names if (match := re.match(pattern, name)))


def _filled(build: Callable[[], Any], state: Mapping[str, Tensor], dtype: torch.dtype | None) -> Any:
    """The module that `build` makes, with these tensors as its weights, for inference.

    Raises:
        ValueError: missing, unexpected or differently shaped tensors, named.
    """
    with torch.device("meta"):
        module: nn.Module = build()
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    kinds = {
        "missing": sorted(set(expected) - set(state)),
        "unexpected": sorted(set(state) - set(expected)),
        "of the wrong shape": wrong,
    }
    problems = [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(f"does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict({name: _cast(tensor, dtype) for name, tensor in state.items()}, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.contiguous() if dtype is None else tensor.to(dtype).contiguous()


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
