"""Every conversion between clocks (method.md, section 1); nothing else in the code converts times by hand.

Rectified flow (RF): s in [0, 1], x_s = (1-s) x0 + s e, network target v = e - x0, noise level sigma = s / (1-s).
TrigFlow: t in [0, pi/2], x_t = cos t x0 + sin t e, network target F = cos t e - sin t x0, noise level sigma = tan t.
A Wan network always sees RF, with timestep = 1000 s.

Times are small tensors, so they are computed and returned in float64 whatever comes in. Latents keep their dtype
(float32 or better); coefficients are computed in float64 and rounded once.

Shapes: B batch; E a sample's own dimensions (C, T, H, W for video latents).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from turbotrain.diffusion.velocity import at_least_float32

NUM_TIMESTEPS = 1000.0
HALF_PI = math.pi / 2


def _time(x: Tensor) -> Tensor:
    return x.to(torch.float64)


def exact_trig(t_B: Tensor) -> Tensor:
    """A TrigFlow time in float64. float32(pi/2) lies above pi/2, where tan is negative: a rounded time is brought back.
    float64 times are taken as they are (finite differences step slightly outside [0, pi/2])."""
    return _time(t_B) if t_B.dtype == torch.float64 else _time(t_B).clamp(max=HALF_PI)


def per_sample(coefficient_B: Tensor, x_BE: Tensor) -> Tensor:
    """A per-sample float64 coefficient, shaped and rounded to multiply x."""
    return coefficient_B.to(x_BE.dtype).reshape(-1, *[1] * (x_BE.ndim - 1))


# -- times -----------------------------------------------------------------------------------------


def rf_to_trig(s_B: Tensor) -> Tensor:
    return torch.atan2(_time(s_B), 1 - _time(s_B))


def trig_to_rf(t_B: Tensor) -> Tensor:
    t = exact_trig(t_B)
    return t.sin() / (t.cos() + t.sin())


def trig_to_sigma(t_B: Tensor) -> Tensor:
    """tan t; about 1.6e16 at pi/2, the largest that float64 can tell from a pole."""
    t = exact_trig(t_B)
    return t.sin() / t.cos()


def sigma_to_trig(sigma_B: Tensor) -> Tensor:
    return torch.atan(_time(sigma_B))


def rf_to_sigma(s_B: Tensor) -> Tensor:
    """s / (1-s); inf at s = 1."""
    return _time(s_B) / (1 - _time(s_B))


def sigma_to_rf(sigma_B: Tensor) -> Tensor:
    """sigma / (1 + sigma), written so that sigma = inf gives 1."""
    return 1 - 1 / (1 + _time(sigma_B))


def rf_to_timestep(s_B: Tensor) -> Tensor:
    return NUM_TIMESTEPS * _time(s_B)


def timestep_to_rf(timestep_B: Tensor) -> Tensor:
    return _time(timestep_B) / NUM_TIMESTEPS


def trig_to_timestep(t_B: Tensor) -> Tensor:
    return rf_to_timestep(trig_to_rf(t_B))


def timestep_to_trig(timestep_B: Tensor) -> Tensor:
    return rf_to_trig(timestep_to_rf(timestep_B))


def shift(u_B: Tensor, k: float) -> Tensor:
    """k u / (1 + (k-1) u): moves RF times towards noise for k > 1."""
    if k <= 0:
        raise ValueError(f"shift must be positive, got {k}; 1 leaves times as they are")
    u = _time(u_B)
    return k * u / (1 + (k - 1) * u)


def unshift(s_B: Tensor, k: float) -> Tensor:
    return shift(s_B, 1 / k)


# -- latents ---------------------------------------------------------------------------------------


def noise_rf(x0_BE: Tensor, noise_BE: Tensor, s_B: Tensor) -> Tensor:
    """x_s = (1-s) x0 + s e."""
    s = _time(s_B)
    x0 = at_least_float32(x0_BE)
    return per_sample(1 - s, x0) * x0 + per_sample(s, x0) * noise_BE


def noise_trig(x0_BE: Tensor, noise_BE: Tensor, t_B: Tensor) -> Tensor:
    """x_t = cos t x0 + sin t e."""
    t = exact_trig(t_B)
    x0 = at_least_float32(x0_BE)
    return per_sample(t.cos(), x0) * x0 + per_sample(t.sin(), x0) * noise_BE


def trig_target(x0_BE: Tensor, noise_BE: Tensor, t_B: Tensor) -> Tensor:
    """F = cos t e - sin t x0, what a TrigFlow network regresses to."""
    t = exact_trig(t_B)
    x0 = at_least_float32(x0_BE)
    return per_sample(t.cos(), x0) * noise_BE - per_sample(t.sin(), x0) * x0


def trig_state_to_rf(x_t_BE: Tensor, t_B: Tensor) -> Tensor:
    """x_s = x_t / (cos t + sin t)."""
    t = exact_trig(t_B)
    x_t = at_least_float32(x_t_BE)
    return x_t / per_sample(t.cos() + t.sin(), x_t)


def rf_state_to_trig(x_s_BE: Tensor, s_B: Tensor) -> Tensor:
    t = rf_to_trig(s_B)
    x_s = at_least_float32(x_s_BE)
    return x_s * per_sample(t.cos() + t.sin(), x_s)


# -- network outputs -------------------------------------------------------------------------------


def x0_from_velocity(x_t_BE: Tensor, v_BE: Tensor, t_B: Tensor) -> Tensor:
    """x0 = (x_t - sin t v) / (cos t + sin t), finite everywhere (unlike (cos t x_t - x0) / sin t read backwards at t
    = 0)."""
    t = exact_trig(t_B)
    x_t = at_least_float32(x_t_BE)
    c = t.cos() + t.sin()
    return per_sample(1 / c, x_t) * x_t - per_sample(t.sin() / c, x_t) * v_BE


def trig_from_velocity(x_t_BE: Tensor, v_BE: Tensor, t_B: Tensor) -> Tensor:
    """F = (v + (cos t - sin t) x_t) / (cos t + sin t)."""
    t = exact_trig(t_B)
    x_t = at_least_float32(x_t_BE)
    c = t.cos() + t.sin()
    return per_sample(1 / c, x_t) * v_BE + per_sample((t.cos() - t.sin()) / c, x_t) * x_t


def velocity_from_trig(x_t_BE: Tensor, f_BE: Tensor, t_B: Tensor) -> Tensor:
    """v = (cos t + sin t) F - (cos t - sin t) x_t."""
    t = exact_trig(t_B)
    x_t = at_least_float32(x_t_BE)
    return per_sample(t.cos() + t.sin(), x_t) * f_BE - per_sample(t.cos() - t.sin(), x_t) * x_t


def x0_from_trig(x_t_BE: Tensor, f_BE: Tensor, t_B: Tensor) -> Tensor:
    """x0 = cos t x_t - sin t F."""
    t = exact_trig(t_B)
    x_t = at_least_float32(x_t_BE)
    return per_sample(t.cos(), x_t) * x_t - per_sample(t.sin(), x_t) * f_BE


def x0_from_velocity_rf(x_s_BE: Tensor, v_BE: Tensor, s_B: Tensor) -> Tensor:
    """x0 = x_s - s v."""
    x_s = at_least_float32(x_s_BE)
    return x_s - per_sample(_time(s_B), x_s) * v_BE


# -- distributions of training times ---------------------------------------------------------------


def sample_lognormal(z_B: Tensor, p_mean: float, p_std: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """RF times with sigma = exp(p_mean + p_std z), z standard normal; truncated to low <= s <= high when those are
    given (an expert of a two-expert model sees only its side of the boundary). Truncation maps z through its own
    quantile."""
    z = _time(z_B)
    if not 0 <= low < high <= 1:
        raise ValueError(f"low, high must satisfy 0 <= low < high <= 1, got {low}, {high}")
    if p_std <= 0:
        raise ValueError(f"p_std must be positive, got {p_std}")
    if low > 0 or high < 1:
        edges = torch.tensor([low, high], dtype=torch.float64)
        first, last = torch.special.ndtr((torch.logit(edges) - p_mean) / p_std).tolist()
        z = torch.special.ndtri(first + (last - first) * torch.special.ndtr(z))
    return torch.sigmoid(p_mean + p_std * z).clamp(low, high)


def sample_uniform_shift(u_B: Tensor, k: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """RF times s = shift(u, k), u uniform in [0, 1); truncated to [low, high]."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"low, high must satisfy 0 <= low < high <= 1, got {low}, {high}")
    first, last = unshift(torch.tensor([low, high], dtype=torch.float64), k).tolist()
    return shift(first + (last - first) * _time(u_B), k).clamp(low, high)
