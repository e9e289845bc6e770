"""Values that carry a tangent: how one forward pass of the network also yields its directional derivative.

Forward-mode AD of the whole module fails under DDP, FSDP2 and ZeRO-3. So the network is written once on
`Dual`s, a value with its graph and, when asked for, a tangent without one: linear layers multiply the tangent by the
same weight, small pure functions take theirs from `torch.func.jvp` on detached inputs, attention from turbokernels.
Without tangents each function here is a plain call.

Shape suffixes: B batch, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbotrain.model.compiled import tangent_of, value_of


class Dual(NamedTuple):
    """x: a value. t: its tangent, of x's shape and dtype and without a graph; None stands for zero."""

    x: Tensor
    t: Tensor | None = None


class Quantized(NamedTuple):
    """What linears with 8-bit activations read in place of a Dual: values (..., K), their scales; dtype: of the results."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Quantized:
        """Tokens start to stop of values (B, L, K); start is a multiple of the scales' tile, where they have one."""
        scale = self.scale
        if scale.ndim == self.values.ndim:  # one scale for each 128 tokens
            return Quantized(self.values[:, start:stop], scale[:, start // 128 : -(-stop // 128)], self.dtype)
        return Quantized(self.values[:, start:stop], scale[:, start:stop], self.dtype)


_left_out = [False]


def tangents_left_out() -> bool:
    """Whether a pass that had tangents is being computed again without them: what it saves for the backward pass must be what
    the first one saved."""
    return _left_out[-1]


def without_tangents() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a checkpointed pass with tangents and of its recomputation."""
    return nullcontext(), _leaving_out()


@contextmanager
def _leaving_out() -> Iterator[None]:
    _left_out.append(True)
    try:
        yield
    finally:
        _left_out.pop()


def wide(x: Tensor) -> Tensor:
    """x in the precision of the float32 islands: float32, or float64 when it already is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def lift(fn: Callable[..., Tensor], *args: Any) -> Dual:
    """fn(*args) for a pure function, with its tangent along the tangents of those args that are Duals."""
    values = [arg.x if isinstance(arg, Dual) else arg for arg in args]
    tangents = {i: arg.t for i, arg in enumerate(args) if isinstance(arg, Dual) and arg.t is not None}
    if not tangents:
        return Dual(value_of(fn, values))
    primal, tangent = tangent_of(fn, values, tangents)
    if primal is None or torch.is_grad_enabled():
        primal = value_of(fn, values)
    return Dual(primal, tangent)


def add(a: Dual, b: Dual) -> Dual:
    """a + b; the shapes may broadcast when only one of the two has a tangent of the full shape."""
    if a.t is None or b.t is None:
        return Dual(a.x + b.x, b.t if a.t is None else a.t)
    return Dual(a.x + b.x, a.t + b.t)


def cast(dual: Dual, dtype: torch.dtype) -> Dual:
    """The dual in another precision."""
    return Dual(dual.x.to(dtype), None if dual.t is None else dual.t.to(dtype))


class Linear(nn.Linear):
    """nn.Linear that takes a tangent along: (x, tx) -> (W x + b, W tx).

    The tangent is computed inside forward, because ZeRO-3 frees the weight as soon as forward returns.
    """

    has_tangent = True

    def forward(self, input: Tensor, tangent: Tensor | None = None) -> Any:
        out = F.linear(input, self.weight, self.bias)
        if tangent is None:
            return out
        with torch.no_grad():
            return out, F.linear(tangent, self.weight)


class WideLinear(Linear):
    """A Linear of the float32 islands: whatever dtype its weight is stored in, it multiplies in float32 or better."""

    def forward(self, input: Tensor, tangent: Tensor | None = None) -> Any:
        if torch.is_autocast_enabled(input.device.type):
            with torch.autocast(input.device.type, enabled=False):
                return self.forward(input, tangent)
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.weight.dtype), torch.float32)
        weight = self.weight.to(dtype)
        out = F.linear(input.to(dtype), weight, None if self.bias is None else self.bias.to(dtype))
        if tangent is None:
            return out
        with torch.no_grad():
            return out, F.linear(tangent.to(dtype), weight)


def unbind(dual: Dual, dim: int) -> list[Dual]:
    """The slices along a dimension, each with its tangent."""
    values = dual.x.unbind(dim)
    slopes = [None] * len(values) if dual.t is None else dual.t.unbind(dim)
    return [Dual(value, slope) for value, slope in zip(values, slopes)]


def linear(module: nn.Module, dual: Dual | Quantized) -> Dual:
    """module(dual) for a linear layer. Raises ValueError when a quantized layer is asked for a tangent."""
    if isinstance(dual, Quantized):
        return Dual(module(dual))
    if dual.t is None:
        return Dual(module(dual.x))
    if not getattr(module, "has_tangent", False):
        raise ValueError(
            f"{type(module).__name__} has no tangent: quantized layers are for inference; load the checkpoint with an "
            "explicit dtype (for example torch.bfloat16), which dequantizes it"
        )
    return Dual(*module(dual.x, dual.t))
