"""What one process holds of a training state, whatever sharded it: runs of elements of named tensors.

DDP holds tensors whole, FSDP2 rows, DeepSpeed ranges of a flattened tensor. All of them are runs of the row-major elements of
a tensor that has one name everywhere. So a state that was saved on eight processes is read by one or by three, under any
engine: each process fills the runs it holds from whatever files cover them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

LAYOUT_KEY = "layout"


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + tensor.numel()` (row-major) of the tensor `name`, whose whole shape is `shape`.

    `tensor` is the live storage: contiguous, and written in place when a state is read. replicated: every process holds the
    whole, so that the first alone writes it.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    start: int = 0
    replicated: bool = True

    @property
    def flat(self) -> Tensor:
        return self.tensor.detach().view(-1)


def local_piece(name: str, tensor: Tensor) -> Piece:
    """What this process holds of a plain tensor (all) or of a DTensor sharded over rows."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Piece(name, tensor, tuple(tensor.shape))
    mesh = tensor.device_mesh
    # Rows are dealt as torch.chunk deals them; the last processes may hold none.
    rows = -(-tensor.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * rows, tensor.shape[0])
    start = first * math.prod(tensor.shape[1:])
    return Piece(name, tensor.to_local(), tuple(tensor.shape), start, replicated=False)


def write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """One safetensors file of flat tensors; where each belongs stands in its metadata. Only non-empty pieces are written."""
    held = [piece for piece in pieces if piece.tensor.numel()]
    layout = {piece.name: [list(piece.shape), piece.start] for piece in held}
    save_file({piece.name: piece.flat for piece in held}, path, metadata={LAYOUT_KEY: json.dumps(layout)})


class SavedPieces:
    """The files of one saved state, as the tensors that they make up; a context manager that keeps them open.

    Raises:
        ValueError: tensors that are missing, unexpected, of another shape, or incomplete; nothing is half-filled silently.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._stack = ExitStack()
        self._runs: dict[str, list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            for name, (shape, start) in json.loads(file.metadata()[LAYOUT_KEY]).items():
                length = file.get_slice(name).get_shape()[0]
                self._runs.setdefault(name, []).append((start, start + length, file))
                self.shapes[name] = tuple(shape)

    def __enter__(self) -> SavedPieces:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Write the saved elements into the storage of every piece."""
        wanted = list(pieces)
        names = {piece.name for piece in wanted}
        missing, extra = sorted(names - self.shapes.keys()), sorted(self.shapes.keys() - names)
        if missing or extra:
            raise ValueError(
                f"training state of another network or recipe: missing {missing[:5]}, unexpected {extra[:5]}; remove the "
                "stage's state/ folder to begin anew"
            )
        for piece in wanted:
            if self.shapes[piece.name] != piece.shape:
                raise ValueError(
                    f"training state: {piece.name} has shape {self.shapes[piece.name]}, expected {piece.shape}: it is of "
                    "another variant; remove the stage's state/ folder to begin anew"
                )
            self._read(piece.name, piece.start, piece.flat)

    def whole(self, prefix: str) -> dict[str, Tensor]:
        """The full tensors whose names begin with `prefix`, under the rest of their names, on the CPU."""
        found = {}
        for name, shape in self.shapes.items():
            if name.startswith(prefix):
                flat = torch.empty(math.prod(shape), dtype=self._dtype(name))
                self._read(name, 0, flat)
                found[name.removeprefix(prefix)] = flat.view(shape)
        return found

    def _dtype(self, name: str) -> torch.dtype:
        file = self._runs[name][0][2]
        return file.get_slice(name)[0:1].dtype

    def _read(self, name: str, start: int, target: Tensor) -> None:
        stop, filled = start + target.numel(), 0
        for begin, end, file in sorted(self._runs[name], key=lambda run: run[:2]):
            low, high = max(start + filled, begin), min(stop, end)
            if low == start + filled and low < high:
                target[low - start : high - start].copy_(file.get_slice(name)[low - begin : high - begin])
                filled = high - start
        if filled != target.numel():
            raise ValueError(
                f"training state: {name} is incomplete, elements from {start + filled} are in no file; remove this state"
            )


def beside(prefix: str, tensors: Mapping[str, Tensor], like: Mapping[str, Piece]) -> list[Piece]:
    """`tensors` under `prefix`, each laid out as the piece of its name (optimiser states and averages follow the weights)."""
    return [
        dataclasses.replace(like[name], name=f"{prefix}{name}", tensor=tensor)
        if tensor.shape == like[name].tensor.shape
        else Piece(f"{prefix}{name}", tensor, tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def per_block(prefix: str, tensors: Mapping[str, Tensor], like: Mapping[str, Piece], block: int) -> list[Piece]:
    """The same for tensors of one number for every `block` elements, whole blocks of which every process holds."""
    return [
        Piece(
            f"{prefix}{name}",
            tensor,
            (math.prod(like[name].shape) // block,),
            like[name].start // block,
            like[name].replicated,
        )
        for name, tensor in tensors.items()
    ]
