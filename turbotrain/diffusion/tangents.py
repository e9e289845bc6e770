"""The TrigFlow network F and its derivative along the teacher's ODE, from a network that sees rectified flow.

F(x_t, t) = (v(x_s, 1000 s) + d x_t) / c   with  c = cos t + sin t,  d = cos t - sin t,  x_s = x_t / c,  s = sin t / c.
Since c' = d, d' = -c and ds/dt = 1 / c^2, a direction (dx, dt) moves the network's inputs by
  dx_s = dx / c - d / c^2 x_t dt,   dtimestep = 1000 dt / c^2,
and its output by  dF = (dv + d dx) / c - x_t dt - (d / c) F dt.     (method.md, sections 1 and 4a)

Shapes: B batch; E a sample's own dimensions (C, T, H, W for video latents).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turbotrain.diffusion import times
from turbotrain.diffusion.times import NUM_TIMESTEPS, exact_trig, per_sample
from turbotrain.diffusion.velocity import Velocity, at_least_float32


class TrigOutput(NamedTuple):
    """f (B, E): TrigFlow output F. tangent (B, E): its derivative, without a graph. selection: see VelocityOutput."""

    f: Tensor
    tangent: Tensor | None = None
    selection: Any = None


def trig_forward(
    velocity: Velocity, x_t_BE: Tensor, t_B: Tensor, *, selection: Any = None, return_selection: bool = False
) -> TrigOutput:
    """F(x_t, t): one network evaluation."""
    out = velocity(
        times.trig_state_to_rf(x_t_BE, t_B),
        times.trig_to_timestep(t_B),
        selection=selection,
        return_selection=return_selection,
    )
    return TrigOutput(times.trig_from_velocity(x_t_BE, out.v, t_B), None, out.selection)


def trig_x0(velocity: Velocity, x_t_BE: Tensor, t_B: Tensor) -> Tensor:
    """The clean latent predicted at (x_t, t): one network evaluation."""
    out = velocity(times.trig_state_to_rf(x_t_BE, t_B), times.trig_to_timestep(t_B))
    return times.x0_from_velocity(x_t_BE, out.v, t_B)


def trig_jvp(velocity: Velocity, x_t_BE: Tensor, t_B: Tensor, dx_BE: Tensor, dt_B: Tensor) -> TrigOutput:
    """F(x_t, t) with its graph and, from the same evaluation, its derivative along (dx, dt) without one."""
    t, dt = exact_trig(t_B), dt_B.to(torch.float64)
    x_t = at_least_float32(x_t_BE)
    c, d = t.cos() + t.sin(), t.cos() - t.sin()
    with torch.no_grad():
        dx_s = per_sample(1 / c, x_t) * dx_BE - per_sample(d * dt / c**2, x_t) * x_t
    out = velocity(
        times.trig_state_to_rf(x_t, t), times.trig_to_timestep(t), tangents=(dx_s, NUM_TIMESTEPS * dt / c**2)
    )
    if out.tangent is None:
        raise ValueError(
            "the velocity returned no tangent; bind a model that takes tangents=, or use finite differences"
        )
    f = times.trig_from_velocity(x_t, out.v, t)
    with torch.no_grad():
        df = (
            per_sample(1 / c, x_t) * out.tangent
            + per_sample(d / c, x_t) * dx_BE
            - per_sample(dt, x_t) * x_t
            - per_sample(d * dt / c, x_t) * f.detach()
        )
    return TrigOutput(f, df, out.selection)


@torch.no_grad()
def trig_finite_difference(
    velocity: Velocity, x_t_BE: Tensor, t_B: Tensor, direction_BE: Tensor, *, selection: Any = None, h: float = 1e-4
) -> Tensor:
    """dF/dt along the ODE dx/dt = `direction`, central: (F(x+, t+h) - F(x-, t-h)) / (2 sin h), x+- = cos h x_t +- sin
    h dx/dt.

    Two evaluations, with the block lists of (x_t, t) when `selection` holds them: a block that enters or leaves
    between the displaced points would be divided by h. States are displaced in float64, so that only the network
    rounds. Raises ValueError for a half-precision network, which no h can resolve.
    """
    half = (torch.bfloat16, torch.float16)
    dtype = getattr(velocity, "dtype", None)
    if torch.is_autocast_enabled(x_t_BE.device.type):
        dtype = torch.get_autocast_dtype(x_t_BE.device.type)
    if dtype in half:
        raise ValueError(
            f"tangent=finite_difference needs a float32 network, got {dtype}: its rounding divided by h={h:g} "
            "swamps the derivative; use tangent=jvp, or train in float32"
        )
    x_t, direction, t = x_t_BE.double(), direction_BE.double(), exact_trig(t_B)
    ahead = trig_forward(velocity, math.cos(h) * x_t + math.sin(h) * direction, t + h, selection=selection).f
    behind = trig_forward(velocity, math.cos(h) * x_t - math.sin(h) * direction, t - h, selection=selection).f
    return ((ahead - behind) / (2 * math.sin(h))).to(at_least_float32(x_t_BE).dtype)
