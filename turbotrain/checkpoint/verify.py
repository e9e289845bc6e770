"""Whether a written checkpoint is what was read: the same tensors, and the same outputs on random inputs.

Shapes: B batch, C channels, T H W latent frames, height, width, L tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from turbotrain.checkpoint import targets
from turbotrain.checkpoint.header import CheckpointProblem
from turbotrain.checkpoint.identify import Identity, identify_network
from turbotrain.checkpoint.io import load_transformer
from turbotrain.checkpoint.stream import Entry
from turbotrain.model.variants import WanConfig

# A network is loaded when it fits into this part of the free memory: its tensors, and copies of some while they are read.
_PART_OF_MEMORY = 0.4
_TOKENS = 8  # of text


def verify(source: Identity, output: Path, layout: str, exact: bool) -> list[str]:
    """Read `output` back and compare with `source`, expert by expert; returns what was found, a line each.

    exact: nothing was to be lost, so tensors and outputs must be equal bit for bit; otherwise outputs are measured.
    Raises CheckpointProblem when they are not, or an output is not finite.
    """
    said = []
    for expert, place in targets.written_places(output, layout, source.networks).items():
        network, label = source.networks[expert], f"{expert} noise: " if expert else ""
        written = identify_network(place)
        if written.problems:
            raise CheckpointProblem(f"{place}: written, but {written.problems}")
        if exact:
            compare_tensors(network.native, written.native, place)
            said.append(f"{label}{len(written.native)} tensors equal bit for bit")
        need = max(sum(entry.nbytes for entry in part.native.values()) for part in (network, written))
        room = psutil.virtual_memory().available * _PART_OF_MEMORY
        if need > room:
            said.append(
                f"{label}outputs not compared: a network of {need / 2**30:.1f} GiB, with {room / 2**30:.1f} GiB of memory for it"
            )
            continue
        ours, theirs = output_of(network.path, network.config), output_of(place, network.config)
        if not torch.isfinite(theirs).all():
            raise CheckpointProblem(f"{place}: written, but its output on random inputs is not finite")
        if exact and not torch.equal(ours, theirs):
            raise CheckpointProblem(f"{place}: written, but its output on random inputs differs from {network.path}'s")
        error = float((theirs - ours).norm() / ours.norm().clamp_min(1e-30))
        same = "outputs on random inputs equal bit for bit" if exact else f"relative error of the output {error:.2e}"
        said.append(label + same)
    return said


def compare_tensors(ours: dict[str, Entry], theirs: dict[str, Entry], place: Path) -> None:
    """Raises CheckpointProblem unless both have the same names, dtypes, shapes and bits."""
    for name in sorted(set(ours) | set(theirs)):
        if name not in ours or name not in theirs:
            raise CheckpointProblem(f"{place}: written, but {name} is in one of the two checkpoints only")
        left, right = ours[name], theirs[name]
        if (left.shape, left.dtype) != (right.shape, right.dtype) or not torch.equal(_bits(left), _bits(right)):
            raise CheckpointProblem(
                f"{place}: written, but {name} is not what was read; check the disk and convert again"
            )


def _bits(entry: Entry) -> Tensor:
    return entry.read().contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def output_of(path: Path, config: WanConfig) -> Tensor:
    """The velocity of the checkpoint's network, loaded as it is stored on the CPU, on inputs that depend on `config` only."""
    return load_transformer(path)(**random_inputs(config)).float()


def random_inputs(config: WanConfig) -> dict[str, Any]:
    """A latent of 180 tokens (several blocks of SLA), a short text, and what image-to-video networks want besides."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    p, q, r = config.patch_size
    grid = (3 * p, 6 * q, 10 * r)
    inputs: dict[str, Any] = {
        "x_BCTHW": normal(1, config.out_channels, *grid),
        "timestep": torch.tensor([700.0]),
        "context_BLD": normal(1, _TOKENS, config.text_dim),
    }
    if config.condition_channels:
        inputs["y_BCTHW"] = normal(1, config.condition_channels, *grid)
    if config.image_dim is not None:
        inputs["clip_BLD"] = normal(1, _TOKENS, config.image_dim)
    return inputs
