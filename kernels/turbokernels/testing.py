"""The error budget that every implementation of an op is held to: set by data, not by a guessed tolerance.

An implementation may be at most twice as far from the float64 result as plain PyTorch in the same precision is, plus
one rounding of the result to its dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Errors:
    """Distance to a float64 result: the largest and the root mean square over elements, in the result's units."""

    largest: float
    rms: float


def errors(actual: Tensor, exact: Tensor) -> Errors:
    """Distance of `actual` (any dtype) to `exact` (float64, same shape)."""
    if exact.dtype != torch.float64:
        raise ValueError(f"errors: exact has dtype {exact.dtype}; compute it in float64")
    if actual.shape != exact.shape:
        raise ValueError(f"errors: actual has shape {tuple(actual.shape)}; expected {tuple(exact.shape)}")
    difference = actual.detach().to(torch.float64) - exact.detach()
    return Errors(difference.abs().max().item(), difference.square().mean().sqrt().item())


def assert_within_budget(
    actual: Tensor, plain: Tensor, exact: Tensor, name: str = "result", factor: float = 2.0
) -> None:
    """Assert error(actual) <= factor * error(plain) + one rounding, for the largest and the root mean square error.

    actual: what is tested; plain: a straightforward PyTorch computation in the same precision; exact: the same in
    float64. One rounding is half a unit in the last place of `actual`'s dtype at the largest (root mean square)
    magnitude of `exact`. A NaN in any of the three fails.
    """
    got, allowed = errors(actual, exact), errors(plain, exact)
    rounding = torch.finfo(actual.dtype).eps / 2
    limits = Errors(
        factor * allowed.largest + rounding * exact.abs().max().item(),
        factor * allowed.rms + rounding * exact.square().mean().sqrt().item(),
    )
    for kind in ("largest", "rms"):
        error, limit = getattr(got, kind), getattr(limits, kind)
        if not error <= limit:  # also fails on NaN
            raise AssertionError(
                f"{name}: {kind} error {error:.3e} to float64 exceeds {limit:.3e} "
                f"({factor:g} x plain {actual.dtype} {getattr(allowed, kind):.3e} + one rounding)"
            )
