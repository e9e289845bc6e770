"""Clocks there and back in float64, the ends of both clocks, and the distributions of training times."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from turbotrain.diffusion import times
from turbotrain.diffusion.times import HALF_PI

S = torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0, *[i / 50 for i in range(1, 50)]], dtype=torch.float64)
T = torch.tensor([0.0, 1e-6, *[i / 50 * HALF_PI for i in range(1, 51)]], dtype=torch.float64)


def _latents(count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))  # pyright: ignore


@pytest.mark.parametrize(
    ("there", "back", "grid"),
    [
        (times.rf_to_trig, times.trig_to_rf, S),
        (times.trig_to_rf, times.rf_to_trig, T),
        (times.trig_to_sigma, times.sigma_to_trig, T),
        (times.rf_to_sigma, times.sigma_to_rf, S),
        (times.rf_to_timestep, times.timestep_to_rf, S),
        (times.trig_to_timestep, times.timestep_to_trig, T),
        (lambda s: times.shift(s, 5.0), lambda s: times.unshift(s, 5.0), S),
        (lambda s: times.shift(s, 0.3), lambda s: times.unshift(s, 0.3), S),
    ],
)
def test_there_and_back(there, back, grid: Tensor) -> None:
    assert torch.allclose(back(there(grid)), grid, rtol=1e-13, atol=1e-15)


def test_clocks_agree_on_the_noise_level() -> None:
    inner = S[(S > 0) & (S < 1)]
    sigma = times.rf_to_sigma(inner)
    # a rounding of t moves tan t by eps (1 + sigma^2)
    error = (times.trig_to_sigma(times.rf_to_trig(inner)) - sigma).abs()
    assert (error <= 4 * torch.finfo(torch.float64).eps * (1 + sigma**2)).all()


def test_ends() -> None:
    ends = torch.tensor([0.0, HALF_PI], dtype=torch.float64)
    assert torch.allclose(times.trig_to_rf(ends), torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-15)
    assert times.trig_to_timestep(ends)[1].item() == pytest.approx(1000, abs=1e-10)
    assert times.sigma_to_rf(torch.tensor([math.inf])).item() == 1
    assert times.sigma_to_trig(torch.tensor([math.inf])).item() == HALF_PI
    assert times.rf_to_sigma(torch.tensor([1.0])).item() == math.inf


def test_rounded_half_pi_is_still_noise() -> None:
    """float32(pi/2) > pi/2: taken literally, its tangent is -2e7 and s exceeds 1."""
    rounded = torch.tensor([HALF_PI])
    assert rounded.double().item() > HALF_PI
    assert times.trig_to_rf(rounded).item() <= 1
    assert times.trig_to_sigma(rounded).item() > 1e15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_are_float64_whatever_comes_in(dtype: torch.dtype) -> None:
    assert times.rf_to_timestep(torch.tensor([0.5], dtype=dtype)).dtype == torch.float64
    x = torch.ones(1, 2, dtype=dtype)
    assert times.noise_trig(x, torch.ones(1, 2), torch.tensor([0.5])).dtype == torch.float32


def test_latents_on_both_clocks() -> None:
    x0, noise = _latents(len(T))
    x_t, s = times.noise_trig(x0, noise, T), times.trig_to_rf(T)
    x_s = times.noise_rf(x0, noise, s)
    assert torch.allclose(times.trig_state_to_rf(x_t, T), x_s, rtol=1e-12, atol=1e-14)
    assert torch.allclose(times.rf_state_to_trig(x_s, s), x_t, rtol=1e-12, atol=1e-14)


def test_network_outputs_on_both_clocks() -> None:
    """v = e - x0 and F = cos t e - sin t x0 name the same prediction, at every t including both ends."""
    x0, noise = _latents(len(T))
    x_t, v = times.noise_trig(x0, noise, T), noise - x0
    f = times.trig_target(x0, noise, T)
    assert torch.allclose(times.trig_from_velocity(x_t, v, T), f, rtol=1e-12, atol=1e-13)
    assert torch.allclose(times.velocity_from_trig(x_t, f, T), v, rtol=1e-12, atol=1e-13)
    assert torch.allclose(times.x0_from_velocity(x_t, v, T), x0, rtol=1e-12, atol=1e-13)
    assert torch.allclose(times.x0_from_trig(x_t, f, T), x0, rtol=1e-12, atol=1e-13)
    s = times.trig_to_rf(T)
    assert torch.allclose(times.x0_from_velocity_rf(times.noise_rf(x0, noise, s), v, s), x0, rtol=1e-12, atol=1e-13)


def test_at_the_ends_a_wrong_velocity_still_gives_finite_numbers() -> None:
    x_t, v = _latents(2)
    t = torch.tensor([0.0, HALF_PI], dtype=torch.float64)
    f = times.trig_from_velocity(x_t, v, t)
    assert torch.equal(f[0], v[0] + x_t[0])
    assert torch.allclose(f[1], v[1] - x_t[1])
    x0 = times.x0_from_velocity(x_t, v, t)
    assert torch.equal(x0[0], x_t[0])
    assert torch.allclose(x0[1], x_t[1] - v[1])


def test_lognormal_times_have_the_named_quantiles() -> None:
    z = torch.tensor([-1.0, 0.0, 1.0])
    sigma = times.rf_to_sigma(times.sample_lognormal(z, 0.7, 1.6))
    assert sigma.log().tolist() == pytest.approx([0.7 - 1.6, 0.7, 0.7 + 1.6], abs=1e-12)


def test_truncated_times_stay_on_their_side_and_keep_the_shape() -> None:
    g = torch.Generator().manual_seed(0)
    z, u = torch.randn(20_000, generator=g), torch.rand(20_000, generator=g)
    free = times.sample_lognormal(z, 1.5, 1.6)
    high, low = (times.sample_lognormal(z, 1.5, 1.6, *edges) for edges in ((0.875, 1.0), (0.0, 0.875)))
    assert high.min() >= 0.875
    assert low.max() <= 0.875
    # truncation is conditioning: its quantiles are those of the samples that fall there anyway
    for q in (0.1, 0.5, 0.9):
        assert high.quantile(q).item() == pytest.approx(free[free >= 0.875].quantile(q).item(), abs=5e-3)
        assert low.quantile(q).item() == pytest.approx(free[free < 0.875].quantile(q).item(), abs=2e-2)
    shifted = times.sample_uniform_shift(u, 5.0)
    part = times.sample_uniform_shift(u, 5.0, 0.9, 1.0)
    assert part.min() >= 0.9
    assert part.median().item() == pytest.approx(shifted[shifted >= 0.9].median().item(), abs=5e-3)


def test_extreme_draws_stay_finite() -> None:
    z = torch.tensor([-40.0, 40.0])
    assert times.sample_lognormal(z, 1.5, 1.6).tolist() == pytest.approx([0, 1])
    assert times.sample_lognormal(z, 1.5, 1.6, 0.9, 1.0).tolist() == pytest.approx([0.9, 1])
    assert times.sample_uniform_shift(torch.tensor([0.0, 1.0]), 5.0).tolist() == [0, 1]


def test_bad_parameters_are_named() -> None:
    z = torch.zeros(1)
    with pytest.raises(ValueError, match=r"low, high .* got 0\.9, 0\.5"):
        times.sample_lognormal(z, 0, 1, 0.9, 0.5)
    with pytest.raises(ValueError, match="low, high"):
        times.sample_uniform_shift(z, 1.0, -0.1, 0.5)
    with pytest.raises(ValueError, match="p_std must be positive, got 0"):
        times.sample_lognormal(z, 0, 0)
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        times.shift(z, 0)
