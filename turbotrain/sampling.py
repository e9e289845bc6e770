"""From text embeddings and noise to latents: which sampler runs with which numbers, and the one place that calls the networks.

Shapes: B videos, C latent channels, T latent frames, H, W latent height and width, L text tokens, D their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from turbotrain.conditioning import Conditioning
from turbotrain.diffusion.guidance import guided, switch_experts
from turbotrain.diffusion.samplers import TURBO_TIMES, Grid, Solver, sample_teacher, sample_turbo
from turbotrain.diffusion.velocity import Velocity, bind
from turbotrain.model.variants import Variant

StepCallback = Callable[[int, Tensor], None]  # (index of the step, its clean prediction (B, C, T, H, W))


class SamplerOptions(TypedDict, total=False):
    """What a caller may say of a sampler; what is left out, or None, is the checkpoint's or the variant's.

    mode: `turbo` (method.md 6: no guidance; reads `ode`, `sigma_max`) or `teacher` (method.md 2: reads the others).
    integer_timesteps: the network is told truncated timesteps, as by the UniPC of the official code and of diffusers.
    """

    mode: str
    guidance: float | None
    solver: Solver
    grid: Grid
    integer_timesteps: bool
    shift: float | None
    ode: bool | None
    sigma_max: float | None


@dataclass(frozen=True)
class TurboSettings:
    """The Turbo sampler's numbers. times: TrigFlow, one a step."""

    steps: int
    times: tuple[float, ...]
    ode: bool
    sigma_max: float

    def sample(
        self,
        velocity: Velocity,
        noise_BCTHW: Tensor,
        generators: Sequence[torch.Generator],
        callback: StepCallback | None = None,
    ) -> Tensor:
        return sample_turbo(
            velocity, noise_BCTHW, self.steps, self.sigma_max, self.ode, generators, self.times, callback
        )


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher's numbers. cfg: guidance scale as (low, high) noise expert; one network has the first."""

    steps: int
    shift: float
    solver: Solver
    grid: Grid
    cfg: tuple[float, float]
    integer_timesteps: bool = False

    def sample(
        self,
        velocity: Velocity,
        noise_BCTHW: Tensor,
        generators: Sequence[torch.Generator],
        callback: StepCallback | None = None,
    ) -> Tensor:
        return sample_teacher(
            velocity,
            noise_BCTHW,
            self.steps,
            self.shift,
            self.solver,
            self.grid,
            integer_timesteps=self.integer_timesteps,
            callback=callback,
        )


def sampler_settings(
    variant: Variant,
    recorded: Mapping[str, Any] | None = None,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    *,
    mode: str = "turbo",
    guidance: float | None = None,
    solver: Solver = "unipc",
    grid: Grid = "wan",
    integer_timesteps: bool = False,
    shift: float | None = None,
    ode: bool | None = None,
    sigma_max: float | None = None,
) -> TurboSettings | TeacherSettings:
    """What is said here, else what the checkpoint records of its Turbo sampler (`sigma_max`, `times`, `ode`), else the variant's
    for videos of `size` (height, width) pixels.

    Raises:
        ValueError: mode, steps or sigma_max out of range.
    """
    if mode == "turbo":
        return _turbo_settings(variant, recorded or {}, steps, ode, sigma_max)
    if mode != "teacher":
        raise ValueError(f"mode = {mode!r}: choose turbo or teacher")
    steps = variant.teacher_steps if steps is None else steps
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps = {steps}: the teacher sampler takes 1 to 1000")
    cfg = variant.cfg if guidance is None else (guidance, guidance)
    if shift is None:
        shift = variant.shift if size is None else variant.shift_at(*size)
    return TeacherSettings(steps, shift, solver, grid, cfg, integer_timesteps)


def _turbo_settings(
    variant: Variant, recorded: Mapping[str, Any], steps: int | None, ode: bool | None, sigma_max: float | None
) -> TurboSettings:
    later = tuple(recorded.get("times") or TURBO_TIMES)  # TrigFlow times of the steps after the first
    steps = len(later) + 1 if steps is None else steps
    if not 1 <= steps <= len(later) + 1:
        raise ValueError(f"steps = {steps}: the Turbo sampler of this checkpoint takes 1 to {len(later) + 1}")
    sigma = float(recorded.get("sigma_max", variant.sigma_max)) if sigma_max is None else sigma_max
    least = math.tan(later[0]) if steps > 1 else 0.0
    if not sigma > least:
        raise ValueError(f"sigma_max = {sigma:g}: must be above {least:.4g}, the noise level of the second step")
    times = (math.atan(sigma), *later)[:steps]
    return TurboSettings(steps, times, bool(recorded.get("ode", False)) if ode is None else ode, sigma)


def network_velocity(
    experts: Sequence[nn.Module],
    context_BLD: Tensor,
    conditioning: Conditioning,
    boundary: float | None = None,
    negative_BLD: Tensor | None = None,
    cfg: tuple[float, float] = (1.0, 1.0),
    encode_once: bool = False,
) -> Velocity:
    """What a sampler evaluates at every step: each network with its conditioning, guided where there is a negative embedding,
    and the switch between two of them (the high-noise expert comes first, its scale in `cfg` second).

    encode_once: as `bind` takes it.
    """
    given = {**conditioning.arguments, "encode_once": encode_once}
    velocities: list[Velocity] = []
    for index, expert in enumerate(experts):
        velocity: Velocity = bind(expert, context_BLD, **given)
        if negative_BLD is not None:
            low_scale, high_scale = cfg
            scale = high_scale if index == 0 and len(experts) > 1 else low_scale
            velocity = guided(velocity, bind(expert, negative_BLD, **given), scale)
        velocities.append(velocity)
    if len(velocities) == 1:
        return velocities[0]
    assert boundary is not None  # every two-expert variant has one
    return switch_experts(velocities[0], velocities[1], boundary)
