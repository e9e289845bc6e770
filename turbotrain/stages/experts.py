"""What is different when a run trains one expert of a two-expert variant (method: rCM, 4f): its range of times.

All functions take and give RF times unless said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from turbotrain.diffusion.times import rf_to_trig, unshift
from turbotrain.model.variants import Variant

Range = tuple[float, float]
HIGH = "high"


def time_range(variant: Variant, expert: str) -> Range:
    """The RF times that the trained network answers for: all, or its side of the boundary."""
    if variant.boundary is None:
        return 0.0, 1.0
    return (variant.boundary, 1.0) if expert == HIGH else (0.0, variant.boundary)


def grid_range(within: Range, steps: int, shift: float) -> range:
    """Indices of dcm's grid of `steps` shifted intervals whose every starting time lies within.

    Raises:
        ValueError: there are none.
    """
    u_low, u_high = unshift(torch.tensor(within, dtype=torch.float64), shift).tolist()
    # Index i stands for u in (i, i + 1] / steps; a time that is a grid point but for rounding is one.
    found = range(math.ceil(u_low * steps - 1e-9), math.floor(u_high * steps + 1e-9))
    if not found:
        raise ValueError(f"rcm.dcm_grid={steps}: no step of the grid lies within the expert's times {within}; use more")
    return found


def times_within(within: Range, times: Sequence[float]) -> list[float]:
    """Those of the sampler's TrigFlow times at which the trained network is asked."""
    low, high = rf_to_trig(torch.tensor(within, dtype=torch.float64)).tolist()
    # As the sampler switches: at the boundary the high-noise expert answers.
    return [t for t in times if low <= t and (t < high or within[1] == 1)]
