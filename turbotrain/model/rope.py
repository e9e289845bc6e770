"""3-D rotary position embedding of Wan (formats.md 1) and the order in which tokens enter the blocks (method.md 3).

Tables come from cached functions, not buffers: a network built on the meta device has nothing to restore.

Shape suffixes: L tokens, P frequency pairs of one head (head_dim / 2).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

THETA = 10_000.0
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
Grid = tuple[int, int, int]


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Frequency pairs of a head that encode t, h, w: (22, 21, 21) for head_dim 128."""
    side = head_dim // 6
    return (head_dim // 2 - 2 * side, side, side)


_witnesses: list[list[Tensor]] = []


@contextmanager
def tables_used() -> Iterator[list[Tensor]]:
    """The tensors that the functions below gave out inside: who reads them later, by address, must hold them himself."""
    used: list[Tensor] = []
    _witnesses.append(used)
    try:
        yield used
    finally:
        _witnesses.pop()


def _made_once(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Remembers results, except in a compiled graph, which makes its own: on the device, in microseconds."""
    remember = functools.lru_cache(maxsize=16)(function)

    @functools.wraps(function)
    def make(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        made = remember(*args, **kwargs)
        for used in _witnesses:
            if isinstance(made, Tensor):
                used.append(made)
        return made

    return make


@_made_once
def rope_table(grid: Grid, head_dim: int, block: int | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """cos and sin of the angles (2, L, P) in `dtype`, for the tokens of `grid` (t, h, w) in `token_order`.

    Angles are computed in float64, as published: position * theta^(-2 j / width of the axis).
    """
    with torch.inference_mode(False):  # a table first made while sampling must still be usable in training
        axes = (torch.arange(n, dtype=torch.float64, device=device) for n in grid)
        positions = torch.cartesian_prod(*axes).reshape(-1, 3)
        angles = []
        for axis, pairs in enumerate(axis_pairs(head_dim)):
            frequencies_P = THETA ** -(torch.arange(pairs, dtype=torch.float64, device=device) / max(1, pairs))
            angles.append(positions[:, axis, None] * frequencies_P)
        angles_LP = torch.cat(angles, dim=1)
        order_L = token_order(grid, block, device)
        if order_L is not None:
            angles_LP = angles_LP[order_L]
        return torch.stack([angles_LP.cos(), angles_LP.sin()]).to(dtype)


def cube_shape(grid: Grid, block: int) -> Grid:
    """(t, h, w) of the box that `block` tokens (a power of two) cover: as near to a cube as the grid allows.

    Boxes that divide the grid exactly come first; without one, t and h extents near a cube's, clipped to the grid.
    """
    powers = [2**i for i in range(int(math.log2(block)) + 1)]
    boxes = [(t, h, block // (t * h)) for t in powers for h in powers if t * h <= block]
    exact = [box for box in boxes if all(n % side == 0 for n, side in zip(grid, box))]
    compact = [box for box in exact if max(box) <= 4 * min(box)]
    if compact:
        return min(compact, key=lambda box: (sum(box), box))
    t = min(grid[0], 2 ** int(math.log2(block) // 3))
    h = min(grid[1], 2 ** int(math.log2(block / t) // 2))
    return (t, h, -(-block // (t * h)))


def _even_split(length: int, parts: int) -> list[range]:
    bounds = [round(i * length / parts) for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


@_made_once
def token_order(grid: Grid, block: int | None, device: torch.device) -> Tensor | None:
    """Raster indices (L,) of the tokens in the order in which they enter the network; None for raster order itself.

    The grid is cut into beams along w, of t x h cross-sections near `cube_shape`'s, walked column by column, there and
    back as an ox ploughs. Any run of `block` consecutive tokens is then a compact box, or two boxes that touch where a
    beam ends; when the box divides the grid, each aligned run is exactly one box.
    """
    if block is None:
        return None
    n_t, n_h, n_w = grid
    box_t, box_h, _ = cube_shape(grid, block)
    index = torch.arange(n_t * n_h * n_w, device=device).view(grid)
    pieces: list[Tensor] = []
    forward_h = forward_w = True
    for ts in _even_split(n_t, max(1, round(n_t / box_t))):
        beams = _even_split(n_h, max(1, round(n_h / box_h)))
        for hs in beams if forward_h else reversed(beams):
            beam_WTH = index[ts.start : ts.stop, hs.start : hs.stop].permute(2, 0, 1)
            pieces.append((beam_WTH if forward_w else beam_WTH.flip(0)).reshape(-1))
            forward_w = not forward_w
        forward_h = not forward_h
    with torch.inference_mode(False):
        return torch.cat(pieces)


@_made_once
def inverse_order(grid: Grid, block: int, device: torch.device) -> Tensor:
    """Where each raster token sits in `token_order(grid, block)`: indexing with it restores raster order."""
    order_L = token_order(grid, block, device)
    assert order_L is not None
    with torch.inference_mode(False):
        return order_L.argsort()
