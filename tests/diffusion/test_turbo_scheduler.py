"""TurboScheduler, driven as diffusers' pipelines drive it, against the Turbo sampler; its interface and its refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from turbotrain import TurboScheduler
from turbotrain.diffusion import samplers, times
from turbotrain.diffusion.velocity import from_function

SIZE = {"height": 16, "width": 32, "num_frames": 5}
SHAPE = (3, 2, 2, 4)  # latents of SIZE
PIPE = SimpleNamespace(
    vae=SimpleNamespace(config=SimpleNamespace(z_dim=3)),
    vae_scale_factor_temporal=4,
    vae_scale_factor_spatial=8,
    _execution_device=torch.device("cpu"),
)


def _velocity(x: Tensor, timestep_B: Tensor) -> Tensor:
    """A network in float32, whatever precision its caller keeps."""
    x, s = x.float(), timestep_B.float().reshape(-1, *[1] * (x.ndim - 1)) / 1000
    return torch.tanh(x * (1 + s)) - 0.3 * x.roll(1, -1) * torch.cos(4 * s) + 0.2


def _run(scheduler: TurboScheduler, latents: Tensor, steps: int, **options: Any) -> Tensor:
    """The loop of diffusers' WanPipeline."""
    scheduler.set_timesteps(steps, device=latents.device)
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        v = _velocity(latents, timestep.expand(len(latents)))
        latents = scheduler.step(v, timestep, latents, return_dict=False, **options)[0]
    return latents


def _sampled(steps: int, seeds: list[int], **options: Any) -> Tensor:
    generators = samplers.seeded_generators(seeds, "cpu")
    noise = samplers.draw_noise((len(seeds), *SHAPE), generators)
    return samplers.sample_turbo(from_function(_velocity), noise, steps, generators=generators, **options)


@pytest.mark.parametrize("sigma_max", [80.0, 200.0])
@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_it_gives_what_the_sampler_gives(steps: int, ode: bool, sigma_max: float) -> None:
    """From equal seeds; they differ by the float32 rounding of the first state that a pipeline passes on."""
    scheduler = TurboScheduler(sigma_max=sigma_max, ode=ode)
    generators = samplers.seeded_generators([3, 4], "cpu")
    latents = scheduler.initial_latents(PIPE, generators, batch_size=2, **SIZE)
    expected = _sampled(steps, [3, 4], sigma_max=sigma_max, ode=ode)
    assert latents.shape == (2, *SHAPE)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(_run(scheduler, latents, steps), expected, atol=2e-6, rtol=0)


def test_one_generator_is_a_list_of_one() -> None:
    scheduler = TurboScheduler()
    runs = [
        _run(scheduler, scheduler.initial_latents(PIPE, generator, **SIZE), 4)
        for generator in (torch.Generator().manual_seed(5), samplers.seeded_generators([5], "cpu"))
    ]
    assert torch.equal(*runs)
    torch.testing.assert_close(runs[0], _sampled(4, [5]), atol=2e-6, rtol=0)


def test_times_of_its_own() -> None:
    scheduler = TurboScheduler(times=(1.3, 0.6))
    latents = scheduler.initial_latents(PIPE, torch.Generator().manual_seed(1), **SIZE)
    first = float(torch.atan(torch.tensor(80.0, dtype=torch.float64)))
    expected = _sampled(3, [1], times=[first, 1.3, 0.6])
    torch.testing.assert_close(_run(scheduler, latents, 3), expected, atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match="num_inference_steps=4: this Turbo scheduler takes 1 to 3"):
        scheduler.set_timesteps(4)


def test_times_are_those_that_networks_and_boundaries_read() -> None:
    scheduler = TurboScheduler(sigma_max=200.0)
    scheduler.set_timesteps(4)
    s = samplers.turbo_times(4, 200.0)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * x for x in s[:-1]])
    assert scheduler.sigmas.tolist() == pytest.approx(s)
    assert (len(scheduler), scheduler.order) == (4, 1)
    assert scheduler.init_noise_sigma == pytest.approx(200 / 201)
    boundary = 0.9 * scheduler.config["num_train_timesteps"]
    assert (scheduler.timesteps >= boundary).tolist() == [True, True, False, False]


def test_without_initial_latents_the_state_is_what_the_network_saw() -> None:
    """Unit noise goes through as it is: x0 = e - s v(e)."""
    scheduler = TurboScheduler()
    noise = torch.randn(2, *SHAPE)
    expected = noise - scheduler.init_noise_sigma * _velocity(noise, scheduler.timesteps[:1].expand(2))
    torch.testing.assert_close(_run(scheduler, noise, 1), expected)


def test_noise_is_the_global_generators_or_that_of_the_step() -> None:
    scheduler, latents = TurboScheduler(), torch.randn(2, *SHAPE)

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return _run(scheduler, latents, 3)

    assert torch.equal(seeded(0), seeded(0))
    assert not torch.equal(seeded(0), seeded(1))
    given = [_run(scheduler, latents, 3, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*given)


def test_a_generator_is_for_one_video() -> None:
    """A second call does not go on drawing from the first one's."""
    scheduler = TurboScheduler()
    generator = torch.Generator().manual_seed(0)
    latents = scheduler.initial_latents(PIPE, generator, **SIZE)
    _run(scheduler, latents, 4)
    state = generator.get_state()
    _run(scheduler, latents, 4)
    assert torch.equal(generator.get_state(), state)


def test_the_state_is_float64_between_steps() -> None:
    scheduler = TurboScheduler(ode=True)
    scheduler.set_timesteps(4)
    latents, v = torch.randn(1, 4096), torch.randn(1, 4096, dtype=torch.float64)
    expected = latents.double() - samplers.turbo_times(4, 80.0)[0] * v
    for timestep in scheduler.timesteps:
        latents = scheduler.step(v, timestep, latents).prev_sample
        assert latents.dtype == torch.float32
    assert torch.equal(latents, expected.float())


def test_a_callbacks_latents_are_the_state() -> None:
    scheduler = TurboScheduler(ode=True)
    scheduler.set_timesteps(2)
    s = samplers.turbo_times(2, 80.0)
    v = torch.zeros(1, *SHAPE)
    scheduler.step(v, scheduler.timesteps[0], torch.randn(1, *SHAPE))
    changed = torch.randn(1, *SHAPE)
    out = scheduler.step(v + 1, scheduler.timesteps[1], changed, return_dict=False)[0]
    torch.testing.assert_close(out, changed - s[1])


def test_bfloat16_velocities_are_widened_before_they_count() -> None:
    scheduler = TurboScheduler(ode=True)
    scheduler.set_timesteps(1)
    x, v = torch.randn(1, 512), torch.randn(1, 512).bfloat16()
    out = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(out, x - scheduler.init_noise_sigma * v.float(), atol=1e-6, rtol=1e-6)


def test_pipelines_that_begin_from_a_video_join_at_a_later_time() -> None:
    scheduler = TurboScheduler(ode=True)
    scheduler.set_timesteps(4)
    x0, noise = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    s = torch.tensor(samplers.turbo_times(4, 80.0)[2], dtype=torch.float64)
    latents = scheduler.add_noise(x0, noise, scheduler.timesteps[2:3])
    torch.testing.assert_close(latents, times.noise_rf(x0, noise, s.expand(2)))
    assert torch.equal(scheduler.scale_model_input(latents, scheduler.timesteps[2]), latents)
    for timestep in scheduler.timesteps[2:]:
        latents = scheduler.step(noise - x0, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, x0, atol=1e-5, rtol=0)
    assert scheduler.step_index == 4


def test_settings_survive_a_folder(tmp_path: Path) -> None:
    TurboScheduler(sigma_max=120.0, times=(1.4, 1.0), ode=True).save_pretrained(tmp_path / "scheduler")
    again = TurboScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert isinstance(again, TurboScheduler)
    assert (again.config["sigma_max"], again.config["ode"], list(again.config["times"])) == (120.0, True, [1.4, 1.0])
    assert again.num_inference_steps == 3
    other = TurboScheduler.from_config(again.config, ode=False)
    assert isinstance(other, TurboScheduler)
    assert (other.config["sigma_max"], other.config["ode"]) == (120.0, False)


@pytest.mark.parametrize("steps", [-1, 0, 5])
def test_other_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps={steps}: this Turbo scheduler takes 1 to 4"):
        TurboScheduler().set_timesteps(steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_max": 10.0}, "must fall .*sigma_max 10"),
        ({"times": (1.0, 1.4)}, "must fall"),
        ({"times": (1.5, 1.4, 1.0, 0.5)}, "steps must be 1 to 4, got 5"),
        ({"num_train_timesteps": 500}, "num_train_timesteps=500: Wan networks read times of 0 to 1000"),
        ({"sigma_max": None}, "sigma_max=None: say the noise level"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TurboScheduler(**settings)


def test_another_schedulers_settings_need_a_sigma_max() -> None:
    """pipe.scheduler = TurboScheduler.from_config(pipe.scheduler.config), as diffusers' guides swap schedulers."""
    others = UniPCMultistepScheduler(use_flow_sigmas=True, sigma_max=None).config
    with pytest.raises(ValueError, match="sigma_max=None"):
        TurboScheduler.from_config(others)
    swapped = TurboScheduler.from_config(others, sigma_max=80.0)
    assert swapped.num_inference_steps == 4


def test_steps_out_of_turn_are_refused() -> None:
    scheduler, x = TurboScheduler(), torch.randn(1, *SHAPE)
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match=r"timestep=500: must be one of scheduler.timesteps, \[987"):
        scheduler.step(x, 500.0, x)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="all 1 steps are done: call set_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="got 1 for batch_size=2"):
        scheduler.initial_latents(PIPE, [torch.Generator()], batch_size=2)
