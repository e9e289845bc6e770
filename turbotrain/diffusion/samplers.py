"""From noise to latents: the teacher's solvers (method.md, section 2) and the 1 to 4 step Turbo sampler (section 6).

The state is kept in float64: steps near s = 0 are small differences, and a network's rounding should be the only one.

Shapes: B batch; E a sample's own dimensions (C, T, H, W for video latents).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from turbotrain.diffusion import times as clocks
from turbotrain.diffusion.velocity import Velocity

Solver = Literal["euler", "unipc"]
Grid = Literal["wan", "diffusers", "rcm"]
Callback = Callable[[int, Tensor], None]

TURBO_TIMES = (1.5, 1.4, 1.0)  # TrigFlow times of steps 2, 3 and 4
MAX_TURBO_STEPS = 1 + len(TURBO_TIMES)
_LARGEST_SIGMA = 1 - 1e-6  # log-SNR is -inf at 1; diffusers starts UniPC here too


# -- per-sample noise ---------------------------------------------------------------------------------


def seeded_generators(seeds: Sequence[int], device: torch.device | str) -> list[torch.Generator]:
    """One generator per sample, so that sample j of a batch is the sample that its seed gives alone."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal (B, E) float32 on the generators' device, row j from generator j."""
    if len(generators) != shape[0]:
        raise ValueError(f"one generator per sample is needed, got {len(generators)} for a batch of {shape[0]}")
    return torch.stack([torch.randn(*shape[1:], generator=g, device=g.device) for g in generators])


# -- teacher ------------------------------------------------------------------------------------------


def teacher_sigmas(steps: int, shift: float, grid: Grid = "wan") -> Tensor:
    """(steps + 1,) RF times from noise to 0, float64: the grids of published code, shifted by k."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    # start + i * step, as published code's grids are computed: truncated timesteps hang on the last bit of 1000 u
    i = torch.arange(steps + 1, dtype=torch.float64)
    if grid == "wan":
        u = 0.999 + i * (-0.999 / steps)
    elif grid == "diffusers":
        u = 1 + i * ((0.001 - 1) / steps)
    elif grid == "rcm":
        u = 1 + i * (-1 / steps)
    else:
        raise ValueError(f"grid must be 'wan', 'diffusers' or 'rcm', got {grid!r}")
    u[-1] = 0
    return clocks.shift(u, shift)


def sample_teacher(
    velocity: Velocity,
    noise_BE: Tensor,
    steps: int,
    shift: float,
    solver: Solver = "unipc",
    grid: Grid = "wan",
    *,
    integer_timesteps: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Latents (B, E) in the noise's dtype after `steps` evaluations of a (guided) velocity.

    `integer_timesteps` truncates 1000 s as some published code does; `callback(i, x0)` receives each step's clean
    prediction.
    """
    sigmas = teacher_sigmas(steps, shift, grid)
    if solver == "euler":
        return solve_euler(velocity, noise_BE, sigmas, integer_timesteps=integer_timesteps, callback=callback)
    if solver == "unipc":
        return solve_unipc(velocity, noise_BE, sigmas, integer_timesteps=integer_timesteps, callback=callback)
    raise ValueError(f"solver must be 'euler' or 'unipc', got {solver!r}")


@torch.no_grad()
def solve_euler(
    velocity: Velocity,
    noise_BE: Tensor,
    sigmas: Tensor,
    *,
    integer_timesteps: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """x <- x + (s' - s) v over `sigmas` (n + 1,), RF times that fall to 0."""
    x_BE, s = noise_BE.double(), sigmas.double().tolist()
    for i in range(len(s) - 1):
        v_BE = _evaluate(velocity, x_BE, s[i], integer_timesteps)
        if callback is not None:
            callback(i, x_BE - s[i] * v_BE)
        x_BE = x_BE + (s[i + 1] - s[i]) * v_BE
    return x_BE.to(noise_BE.dtype)


@torch.no_grad()
def solve_unipc(
    velocity: Velocity,
    noise_BE: Tensor,
    sigmas: Tensor,
    *,
    integer_timesteps: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1 ("bh2"), on clean predictions (arXiv 2302.04867), over `sigmas` (n + 1,).

    Each evaluation serves twice: it corrects the step that led to its point and predicts the next. The first and the
    last step are of order 1, and the last is not corrected.
    """
    s = sigmas.double().clamp(max=_LARGEST_SIGMA).tolist()
    log_snr = [math.log1p(-x) - math.log(x) if x > 0 else math.inf for x in s]
    n = len(s) - 1
    x_BE = noise_BE.double()
    start_BE = x_BE  # where the current step began, after its correction
    x0s: list[Tensor] = []  # clean predictions at the points visited, the two newest

    def advance(x_from_BE: Tensor, i: int, x0_new_BE: Tensor | None, second_order: bool) -> Tensor:
        """The step from s[i] to s[i+1]; with the prediction made at s[i+1] it is the corrector."""
        h = log_snr[i + 1] - log_snr[i]
        e = math.expm1(-h)
        x0_BE = x0s[-1]
        x_to_BE = (s[i + 1] / s[i]) * x_from_BE - (1 - s[i + 1]) * e * x0_BE
        slope_BE, weight = None, 0.5
        if second_order:
            r = (log_snr[i - 1] - log_snr[i]) / h
            slope_BE = (x0s[-2] - x0_BE) / r
            if x0_new_BE is not None:
                # the paper's weights at order 2 solve [[1, 1], [r, 1]] rho = b
                phi_2 = -e / h - 1
                phi_3 = -phi_2 / h - 0.5
                b_1, b_2 = phi_2 / e, 2 * phi_3 / e
                rho_1 = (b_2 - b_1) / (r - 1)
                slope_BE, weight = rho_1 * slope_BE, b_1 - rho_1
            else:
                slope_BE = 0.5 * slope_BE
        if x0_new_BE is not None:
            new_BE = weight * (x0_new_BE - x0_BE)
            slope_BE = new_BE if slope_BE is None else slope_BE + new_BE
        return x_to_BE if slope_BE is None else x_to_BE - (1 - s[i + 1]) * e * slope_BE

    for i in range(n):
        x0_BE = x_BE - s[i] * _evaluate(velocity, x_BE, s[i], integer_timesteps)
        if callback is not None:
            callback(i, x0_BE)
        if i > 0:
            x_BE = advance(start_BE, i - 1, x0_BE, second_order=i > 1)
        x0s = [*x0s[-1:], x0_BE]
        start_BE = x_BE
        x_BE = advance(start_BE, i, None, second_order=0 < i < n - 1)
    return x_BE.to(noise_BE.dtype)


def _evaluate(velocity: Velocity, x_BE: Tensor, s: float, integer_timesteps: bool) -> Tensor:
    timestep = clocks.NUM_TIMESTEPS * s
    if integer_timesteps:
        timestep = math.floor(timestep)
    timestep_B = torch.full((len(x_BE),), timestep, dtype=torch.float64, device=x_BE.device)
    return velocity(x_BE, timestep_B).v


# -- Turbo --------------------------------------------------------------------------------------------


def turbo_times(steps: int, sigma_max: float, times: Sequence[float] | None = None) -> list[float]:
    """RF times of the Turbo sampler, steps + 1 of them: [atan(sigma_max), 1.5, 1.4, 1.0][:steps] + [0] on the RF clock.
    `times`: other TrigFlow times for the steps, decreasing, without the final 0."""
    if not 1 <= steps <= MAX_TURBO_STEPS:
        raise ValueError(
            f"steps must be 1 to {MAX_TURBO_STEPS}, got {steps}; more steps are what a teacher's solver is for"
        )
    if times is None:
        times = [math.atan(sigma_max), *TURBO_TIMES][:steps]
    if len(times) != steps:
        raise ValueError(f"times must hold one TrigFlow time per step, got {len(times)} for {steps} steps")
    if any(a <= b for a, b in zip(times, [*times[1:], 0.0])) or times[0] > clocks.HALF_PI:
        raise ValueError(
            f"TrigFlow times must fall from at most pi/2 to above 0, got {list(times)} (sigma_max {sigma_max:g})"
        )
    return [*clocks.trig_to_rf(torch.tensor(times, dtype=torch.float64)).tolist(), 0.0]


def turbo_start(noise_BE: Tensor, s: Sequence[float]) -> Tensor:
    """The state (B, E) float64 at the first of the RF times `s`: all noise, s_0 e."""
    return s[0] * noise_BE.double()


def turbo_step(
    x_BE: Tensor, v_BE: Tensor, s: float, s_next: float, noise_BE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(state at s_next, clean prediction) from the state and the velocity at s.

    With fresh noise the SDE, x <- (1-s') x0 + s' e; without, the ODE, x <- x - (s - s') v. At s' = 0 both give x0.
    """
    x0_BE = x_BE - s * v_BE
    if s_next == 0:
        return x0_BE, x0_BE
    if noise_BE is None:
        return x_BE - (s - s_next) * v_BE, x0_BE
    return (1 - s_next) * x0_BE + s_next * noise_BE.to(x_BE), x0_BE


@torch.no_grad()
def sample_turbo(
    velocity: Velocity,
    noise_BE: Tensor,
    steps: int = 4,
    sigma_max: float = 80.0,
    ode: bool = False,
    generators: Sequence[torch.Generator] | None = None,
    times: Sequence[float] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Latents (B, E) in the noise's dtype from a distilled student, without guidance (method.md, section 6).

    SDE (default): fresh noise at every step but the last, float32, row j from generators[j]; ODE: none (`turbo_step`).
    `callback(i, x0)` receives each step's clean prediction. Raises ValueError for steps outside 1..4.
    """
    s = turbo_times(steps, sigma_max, times)
    if steps > 1 and not ode and generators is None:
        raise ValueError("the SDE sampler draws noise at every step: pass generators (one per sample), or ode=True")
    x_BE = turbo_start(noise_BE, s)
    for i in range(steps):
        v_BE = _evaluate(velocity, x_BE, s[i], integer_timesteps=False)
        is_last = i + 1 == steps
        fresh_BE = None if ode or is_last or generators is None else draw_noise(x_BE.shape, generators)
        x_BE, x0_BE = turbo_step(x_BE, v_BE, s[i], s[i + 1], fresh_BE)
        if callback is not None:
            callback(i, x0_BE)
    return x_BE.to(noise_BE.dtype)
