"""Solvers against diffusers' schedulers and closed forms; the Turbo sampler's rules and its determinism."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from turbotrain.diffusion import samplers, times
from turbotrain.diffusion.velocity import from_function


def _nonlinear(x_s: Tensor, timestep_B: Tensor) -> Tensor:
    s = timestep_B.to(x_s.dtype).reshape(-1, *[1] * (x_s.ndim - 1)) / 1000
    return torch.tanh(x_s * (1 + s)) - 0.3 * x_s.roll(1, -1) * torch.cos(4 * s) + 0.2


def _noise(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _diffusers_loop(scheduler, x: Tensor) -> Tensor:
    for timestep in scheduler.timesteps:
        v = _nonlinear(x, timestep.double().expand(len(x)))
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_euler_agrees_with_diffusers(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    sigmas = samplers.teacher_sigmas(steps, shift, "wan")
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    expected = _diffusers_loop(scheduler, _noise())
    assert _relative(samplers.solve_euler(from_function(_nonlinear), _noise(), sigmas), expected) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 50])
def test_unipc_agrees_with_diffusers(steps: int, shift: float) -> None:
    """diffusers' own grid, which starts at s = 1 and truncates timesteps."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2, solver_type="bh2"
    )
    scheduler.set_timesteps(steps)
    ours = samplers.sample_teacher(
        from_function(_nonlinear), _noise(), steps, shift, "unipc", "diffusers", integer_timesteps=True
    )
    assert torch.allclose(samplers.teacher_sigmas(steps, shift, "diffusers").float(), scheduler.sigmas, atol=2e-6)
    assert _relative(ours, _diffusers_loop(scheduler, _noise())) < 1e-5


@pytest.mark.parametrize("grid", ["wan", "rcm"])
def test_unipc_agrees_with_diffusers_on_given_sigmas(grid: samplers.Grid) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=2, solver_type="bh2"
    )
    sigmas = samplers.teacher_sigmas(50, 5.0, grid)
    scheduler.set_timesteps(sigmas=sigmas[:-1].numpy().copy())  # pyright: ignore[reportArgumentType]
    ours = samplers.solve_unipc(from_function(_nonlinear), _noise(), sigmas, integer_timesteps=True)
    assert _relative(ours, _diffusers_loop(scheduler, _noise())) < 1e-5


def test_solvers_converge_at_their_order() -> None:
    """Halving the step divides Euler's error by about 2 and UniPC's by about 4 or more."""

    def error(solver: samplers.Solver, steps: int) -> float:
        fine = samplers.sample_teacher(from_function(_nonlinear), _noise(), 2000, 1.0, "unipc", "wan")
        return _relative(samplers.sample_teacher(from_function(_nonlinear), _noise(), steps, 1.0, solver, "wan"), fine)

    assert 1.8 < error("euler", 40) / error("euler", 80) < 2.3
    assert error("unipc", 40) / error("unipc", 80) > 3
    assert error("unipc", 40) < 0.2 * error("euler", 40)


def test_grids() -> None:
    wan, rcm = samplers.teacher_sigmas(10, 1.0, "wan"), samplers.teacher_sigmas(10, 1.0, "rcm")
    assert (wan[0].item(), rcm[0].item()) == (0.999, 1.0)
    assert wan[-1] == rcm[-1] == samplers.teacher_sigmas(10, 1.0, "diffusers")[-1] == 0
    assert samplers.teacher_sigmas(10, 5.0, "rcm")[5].item() == pytest.approx(5 * 0.5 / 3)
    with pytest.raises(ValueError, match="steps"):
        samplers.teacher_sigmas(0, 1.0)
    with pytest.raises(ValueError, match="grid"):
        samplers.teacher_sigmas(4, 1.0, "karras")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="solver"):
        samplers.sample_teacher(from_function(_nonlinear), _noise(), 4, 1.0, "heun")  # pyright: ignore


def test_turbo_times_are_the_published_ones() -> None:
    assert samplers.turbo_times(4, 80.0) == pytest.approx([80 / 81, 0.9338, 0.8529, 0.6090, 0.0], abs=5e-5)
    assert samplers.turbo_times(1, 200.0) == pytest.approx([200 / 201, 0.0])


@pytest.mark.parametrize("steps", [-1, 0, 5])
def test_turbo_refuses_other_step_counts(steps: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 4, got {steps}"):
        samplers.sample_turbo(from_function(_nonlinear), _noise(), steps)


@pytest.mark.parametrize("bad", [[1.4, 1.5], [1.4, 0.0], [1.8, 1.0], [1.4]])
def test_turbo_refuses_times_that_do_not_fall(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="times"):
        samplers.sample_turbo(from_function(_nonlinear), _noise(), 2, ode=True, times=bad)


def test_turbo_sde_needs_generators_and_one_per_sample() -> None:
    with pytest.raises(ValueError, match="generators"):
        samplers.sample_turbo(from_function(_nonlinear), _noise(), 2)
    with pytest.raises(ValueError, match="one generator per sample"):
        samplers.sample_turbo(from_function(_nonlinear), _noise(), 2, generators=samplers.seeded_generators([0], "cpu"))


@pytest.mark.parametrize("ode", [False, True])
def test_turbo_follows_its_rule(ode: bool) -> None:
    """Written out by hand for three steps."""
    seen: list[Tensor] = []
    noise = _noise().float()
    generators = samplers.seeded_generators([7, 8], "cpu")
    ours = samplers.sample_turbo(
        from_function(_nonlinear), noise, 3, 80.0, ode, generators, callback=lambda i, x0: seen.append(x0)
    )
    again = samplers.seeded_generators([7, 8], "cpu")
    s = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in (math.atan(80.0), 1.5, 1.4)] + [0.0]
    x = noise.double() * s[0]
    for i in range(3):
        v = _nonlinear(x, torch.full((2,), 1000 * s[i], dtype=torch.float64))
        assert torch.allclose(seen[i], x - s[i] * v, rtol=1e-12)
        if ode:
            x = x - (s[i] - s[i + 1]) * v
        else:
            fresh = torch.stack([torch.randn(3, 8, generator=g) for g in again]).double() if i < 2 else 0.0
            x = (1 - s[i + 1]) * (x - s[i] * v) + s[i + 1] * fresh
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, x.float(), rtol=1e-6)


def test_turbo_sample_of_a_batch_is_the_single_run() -> None:
    def run(seeds: list[int]) -> Tensor:
        generators = samplers.seeded_generators(seeds, "cpu")
        noise = samplers.draw_noise((len(seeds), 3, 8), generators)
        return samplers.sample_turbo(from_function(_nonlinear), noise, 4, generators=generators)

    batch = run([3, 4, 5])
    assert torch.equal(batch[1:2], run([4]))
    assert not torch.equal(batch[0], batch[1])


def test_state_is_float64_and_result_in_the_noise_dtype() -> None:
    dtypes = []

    def spy(x: Tensor, timestep: Tensor) -> Tensor:
        dtypes.append((x.dtype, timestep.dtype))
        return _nonlinear(x, timestep)

    noise = _noise().float()
    out = samplers.sample_turbo(from_function(spy), noise, 2, ode=True)
    teacher = samplers.sample_teacher(from_function(spy), noise, 3, 1.0)
    assert out.dtype == teacher.dtype == torch.float32
    assert set(dtypes) == {(torch.float64, torch.float64)}


def test_teacher_sampling_reaches_gaussian_data() -> None:
    """The probability-flow ODE of Gaussian data is known, a fixed multiple of the noise: the solver lands there."""
    std = 0.5

    def velocity(x: Tensor, timestep_B: Tensor) -> Tensor:
        s = times.timestep_to_rf(timestep_B)[:, None, None]
        return (s - (1 - s) * std**2) * x / ((1 - s) ** 2 * std**2 + s**2)

    def error(steps: int) -> float:
        out = samplers.sample_teacher(from_function(velocity), _noise(), steps, 3.0, "unipc", "rcm")
        return _relative(out, std * _noise())

    assert error(50) < 1e-2
    assert error(200) < 0.5 * error(50)
