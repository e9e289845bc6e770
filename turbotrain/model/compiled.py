"""Element-wise functions of a training pass, compiled: one kernel forward, one backward, one for the tangent.

In PyTorch's own kernels a norm with its modulation is six passes over memory in float32, and its tangent fifteen; compiled
they are one each, and only what cannot be computed again cheaply is kept for the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

_enabled = [False]


@contextmanager
def element_wise_compiled(enabled: bool) -> Iterator[None]:
    """Whether `value_of` and `tangent_of` compile inside."""
    _enabled.append(enabled)
    try:
        yield
    finally:
        _enabled.pop()


def value_of(fn: Callable[..., Tensor], values: list[Any]) -> Tensor:
    """fn(*values), with its gradient."""
    if not _enabled[-1]:
        return fn(*values)
    return _compiled_value(fn, _shapes(values))(*values)


def tangent_of(
    fn: Callable[..., Tensor], values: list[Any], tangents: dict[int, Tensor]
) -> tuple[Tensor | None, Tensor]:
    """(fn(*values) unless compiled, its derivative along `tangents` of the arguments of these positions), without gradients."""
    moving = tuple(tangents)
    with torch.no_grad():
        values = [value.detach() if isinstance(value, Tensor) else value for value in values]
        if not _enabled[-1]:
            return _forward_mode(fn, moving, values, tuple(tangents.values()))
        run = _compiled_tangent(fn, moving, _shapes(values))
        return None, run(values, tuple(tangents.values()))


def _forward_mode(
    fn: Callable[..., Tensor], moving: tuple[int, ...], values: list[Any], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    def of_moving(*inputs: Tensor) -> Tensor:
        filled = list(values)
        for position, value in zip(moving, inputs):
            filled[position] = value
        return fn(*filled)

    primal, tangent, *_ = torch.func.jvp(of_moving, tuple(values[position] for position in moving), tangents)
    return primal, tangent


def _shapes(values: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in values)


# One compiled function a shape: one for all would become dynamic at the second shape, and a checkpointed block, computed
# again, would meet another graph than in its first pass. Copied code, because the compiler counts graphs for each code object.
@functools.lru_cache(maxsize=256)
def _compiled_value(fn: Callable[..., Tensor], shapes: tuple[Any, ...]) -> Callable[..., Tensor]:
    return torch.compile(_copied(fn), fullgraph=True, dynamic=False)


@functools.lru_cache(maxsize=256)
def _compiled_tangent(
    fn: Callable[..., Tensor], moving: tuple[int, ...], shapes: tuple[Any, ...]
) -> Callable[[list[Any], tuple[Tensor, ...]], Tensor]:
    def run(values: list[Any], tangents: tuple[Tensor, ...]) -> Tensor:
        return _forward_mode(fn, moving, values, tangents)[1]

    return torch.compile(_copied(run), fullgraph=True, dynamic=False)


def _copied(fn: Any) -> Any:
    return FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
