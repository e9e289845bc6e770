"""The Turbo sampler (method.md, section 6) as a diffusers scheduler, so that `WanPipeline` samples from a distilled network.

    pipe = WanPipeline.from_pretrained(folder, scheduler=TurboScheduler(sigma_max=80.0))
    latents = pipe.scheduler.initial_latents(pipe, torch.Generator().manual_seed(0), num_frames=81, height=480, width=832)
    pipe(prompt, latents=latents, num_frames=81, height=480, width=832, num_inference_steps=4, guidance_scale=1.0)

Two things pass by a scheduler in diffusers' Wan pipelines, and `initial_latents` takes care of both. They feed unit noise e to
the network, where the sampler begins at s_0 e (s_0 = 0.988 for sigma_max 80); a scheduler sees latents only after the network
has. And they keep their generator, from which the SDE draws again, to themselves. Without `initial_latents` the state is
what the network saw, e, and the SDE's noise is the global generator's: another video than `TurboPipeline` gives for that seed.

Shapes: B videos; E a video's own dimensions, C latent channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin  # diffusers looks both up in the module of a scheduler that it loads
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from turbotrain.diffusion import times as clocks
from turbotrain.diffusion.samplers import TURBO_TIMES, turbo_start, turbo_step, turbo_times
from turbotrain.diffusion.velocity import at_least_float32

Generators = torch.Generator | list[torch.Generator]


class TurboScheduler(SchedulerMixin, ConfigMixin):
    """Few steps of a distilled network, without guidance (`guidance_scale=1.0`: guiding is the pipeline's business).

    The state stays in float64 between steps, as in `sample_turbo`; the pipeline is handed its float32 rounding. A callback may
    change the latents between steps: they are the state then.

    Args:
        sigma_max: noise level of the first step, as the network was distilled with.
        times: TrigFlow times of the steps after the first, falling; n of them allow 1 to n + 1 steps.
        ode: x <- x - (s - s') v instead of fresh noise at every step.
        num_train_timesteps: scale of the network's times; pipelines of two experts read it with their boundary_ratio.

    Raises:
        ValueError: times that do not fall from below atan(sigma_max) to above 0, no sigma_max, or another scale than Wan's 1000.
    """

    order = 1
    timesteps: Tensor  # (steps,) 1000 s, float32
    sigmas: Tensor  # (steps + 1,) RF times, float32; pipelines show them to caches

    @register_to_config
    def __init__(
        self,
        sigma_max: float = 80.0,
        times: Sequence[float] = TURBO_TIMES,
        ode: bool = False,
        num_train_timesteps: int = 1000,
    ) -> None:
        if sigma_max is None:  # from_config with another scheduler's configuration
            raise ValueError(
                "sigma_max=None: say the noise level that the network was distilled with, for example sigma_max=80.0"
            )
        if num_train_timesteps != clocks.NUM_TIMESTEPS:
            raise ValueError(f"num_train_timesteps={num_train_timesteps}: Wan networks read times of 0 to 1000")
        self._generator: Generators | None = None
        self.set_timesteps(1 + len(times))

    # -- what pipelines ask before the first step -----------------------------------------------------

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose 1 to 4 steps (as many as `times` allow) and begin a new video.

        Raises:
            ValueError: another number of steps.
        """
        later = self.config["times"]
        if not 1 <= num_inference_steps <= 1 + len(later):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: this Turbo scheduler takes 1 to {1 + len(later)}; more steps are "
                "what a teacher's scheduler is for"
            )
        sigma_max = float(self.config["sigma_max"])
        self._s = turbo_times(num_inference_steps, sigma_max, [math.atan(sigma_max), *later][:num_inference_steps])
        s = torch.tensor(self._s, dtype=torch.float64)
        self.num_inference_steps = num_inference_steps
        self.sigmas = s.to(torch.float32)
        self.timesteps = clocks.rf_to_timestep(s[:-1]).to(device=device, dtype=torch.float32)
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._state_BE: Tensor | None = None

    @property
    def init_noise_sigma(self) -> float:
        """s_0, by which unit noise is multiplied to begin; diffusers' Wan pipelines do not (see the module)."""
        return self._s[0]

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The network sees the state as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - s) x0 + s e at `timesteps` (B,) or (1,), for pipelines that begin from a video; in the dtype of x0 (B, E)."""
        noised = clocks.noise_rf(original_samples, noise, clocks.timestep_to_rf(timesteps.to(original_samples.device)))
        return noised.to(original_samples.dtype)

    def initial_latents(
        self,
        pipe: Any,
        generator: Generators | None = None,
        *,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        batch_size: int = 1,
    ) -> Tensor:
        """s_0 e (B, C, T, H, W) float32: the `latents` of a call of `pipe` with the same sizes (its own defaults, here too).

        generator: one, or a list with one a video (then video j is what its generator gives alone). The SDE's later noise comes
        from it too, in the next call of `pipe`.

        Raises:
            ValueError: another number of generators than videos.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"one generator a video is needed, got {len(generator)} for batch_size={batch_size}")
        shape = (
            batch_size,
            pipe.vae.config.z_dim,
            (num_frames - 1) // pipe.vae_scale_factor_temporal + 1,
            height // pipe.vae_scale_factor_spatial,
            width // pipe.vae_scale_factor_spatial,
        )
        self._generator = generator
        noise_BCTHW = randn_tensor(shape, generator, pipe._execution_device, torch.float32)
        return turbo_start(noise_BCTHW, self._s).float()

    # -- steps ----------------------------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """Steps that are done; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the next video begins; pipelines that say it spare a search for the first timestep."""
        self._begin_index = begin_index

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The latents (B, E) of the next time, in the dtype of `sample`.

        model_output: v (B, E) at `sample` and `timestep`. generator: of the SDE's noise; default: that of `initial_latents`, else
        the global one.

        Raises:
            ValueError: a timestep that is none of `timesteps`, or a step after the last.
        """
        index = self._index_of(timestep) if self._step_index is None else self._step_index
        if index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps are done: call set_timesteps before another video")
        s, s_next = self._s[index], self._s[index + 1]
        noise_BE = None
        if s_next > 0 and not self.config["ode"]:
            chosen = self._generator if generator is None else generator
            noise_BE = randn_tensor(sample.shape, chosen, sample.device, torch.float32)
        state_BE, _ = turbo_step(self._state_of(sample), at_least_float32(model_output), s, s_next, noise_BE)
        self._state_BE, self._step_index = state_BE, index + 1
        if s_next == 0:
            self._generator = None  # it was for this video
        latents_BE = state_BE.to(sample.dtype)
        return SchedulerOutput(prev_sample=latents_BE) if return_dict else (latents_BE,)

    def __len__(self) -> int:
        return len(self.timesteps)

    def _index_of(self, timestep: Tensor | float) -> int:
        if self._begin_index is not None:
            return self._begin_index
        known = self.timesteps.tolist()
        value = float(timestep)
        if value not in known:
            raise ValueError(f"timestep={value:g}: must be one of scheduler.timesteps, {[round(t, 3) for t in known]}")
        return known.index(value)

    def _state_of(self, sample_BE: Tensor) -> Tensor:
        """The float64 state that `sample` is the rounding of, or `sample` itself where it is not (first step, callbacks)."""
        state = self._state_BE
        if state is None or state.shape != sample_BE.shape or state.device != sample_BE.device:
            return sample_BE.double()
        return state if torch.equal(state.to(sample_BE.dtype), sample_BE) else sample_BE.double()
