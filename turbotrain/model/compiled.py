"""Element-wise functions of a training pass, compiled: a kernel forward, one backward, one for the tangent.

In PyTorch's own kernels a norm with its modulation is six passes over memory in float32, and its tangent fifteen; compiled
they are one or two each, and for the backward pass only the arguments are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = Callable[..., Tensor]
_enabled = [False]


@contextmanager
def element_wise_compiled(enabled: bool) -> Iterator[None]:
    """Whether `value_of` and `tangent_of` compile inside."""
    _enabled.append(enabled)
    try:
        yield
    finally:
        _enabled.pop()


def value_of(fn: Function, values: Sequence[Any]) -> Tensor:
    """fn(*values), with its gradient."""
    if not _enabled[-1]:
        return fn(*values)
    return _Compiled.apply(fn, *values)  # pyright: ignore[reportReturnType]


def tangent_of(fn: Function, values: Sequence[Any], tangents: dict[int, Tensor]) -> tuple[Tensor | None, Tensor]:
    """(fn(*values) unless compiled, its derivative along `tangents` of the arguments of these positions), without gradients."""
    moving = tuple(tangents)
    with torch.no_grad():
        values = _detached(values)
        if not _enabled[-1]:
            return _forward_mode(fn, moving, values, tuple(tangents.values()))
        return None, _compiled_tangent(fn, moving, _shapes(values))(values, tuple(tangents.values()))


class _Compiled(torch.autograd.Function):
    """fn(*values): value and gradient are two compiled functions, and shapes and bits of neither depend on how a version of
    the compiler would cut a pass with gradients in two."""

    @staticmethod
    def forward(ctx: Any, fn: Function, *values: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.fn = fn
        ctx.others = [None if isinstance(value, Tensor) else value for value in values]
        ctx.tensors = [position for position, value in enumerate(values) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(values[position] for position in ctx.tensors))
        return _compiled_value(fn, _shapes(values))(_detached(values))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values = list(ctx.others)
        for position, value in zip(ctx.tensors, ctx.saved_tensors):
            values[position] = value.detach()
        wanted = tuple(position for position in ctx.tensors if ctx.needs_input_grad[1 + position])
        found = _compiled_gradient(ctx.fn, wanted, _shapes(values))(values, gradient.contiguous())
        results: list[Tensor | None] = [None] * len(values)
        for position, value in zip(wanted, found):
            results[position] = value.view_as(values[position])
        return (None, *results)


def _with(values: Sequence[Any], positions: Sequence[int], replaced: Sequence[Tensor]) -> list[Any]:
    filled = list(values)
    for position, value in zip(positions, replaced):
        filled[position] = value
    return filled


def _forward_mode(
    fn: Function, moving: tuple[int, ...], values: Sequence[Any], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    def of_moving(*inputs: Tensor) -> Tensor:
        return fn(*_with(values, moving, inputs))

    primal, tangent, *_ = torch.func.jvp(of_moving, tuple(values[position] for position in moving), tangents)
    return primal, tangent


def _detached(values: Sequence[Any]) -> list[Any]:
    return [value.detach() if isinstance(value, Tensor) else value for value in values]


def _shapes(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in values)


# One compiled function a shape: one for all would become dynamic at the second shape, slower, and compiled again. Copied code,
# because the compiler counts how often it compiled each code object.
@functools.lru_cache(maxsize=256)
def _compiled_value(fn: Function, shapes: tuple[Any, ...]) -> Callable[[list[Any]], Tensor]:
    def run(values: list[Any]) -> Tensor:
        return fn(*values)

    return torch.compile(_copied(run), fullgraph=True, dynamic=False)


@functools.lru_cache(maxsize=256)
def _compiled_gradient(
    fn: Function, wanted: tuple[int, ...], shapes: tuple[Any, ...]
) -> Callable[[list[Any], Tensor], tuple[Tensor, ...]]:
    def run(values: list[Any], gradient: Tensor) -> tuple[Tensor, ...]:
        def of_wanted(*inputs: Tensor) -> Tensor:
            return fn(*_with(values, wanted, inputs))

        return torch.func.vjp(of_wanted, *(values[position] for position in wanted))[1](gradient)

    return torch.compile(_copied(run), fullgraph=True, dynamic=False)


@functools.lru_cache(maxsize=256)
def _compiled_tangent(
    fn: Function, moving: tuple[int, ...], shapes: tuple[Any, ...]
) -> Callable[[list[Any], tuple[Tensor, ...]], Tensor]:
    def run(values: list[Any], tangents: tuple[Tensor, ...]) -> Tensor:
        return _forward_mode(fn, moving, values, tangents)[1]

    return torch.compile(_copied(run), fullgraph=True, dynamic=False)


def _copied(fn: Any) -> Any:
    return FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
