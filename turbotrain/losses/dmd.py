"""Distribution matching with a fake score: the reverse divergence of rCM (method.md, sections 4b, 4c; arXiv
2405.14867).

Shapes: B batch; E a sample's own dimensions (C, T, H, W for video latents).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbotrain.diffusion import times
from turbotrain.diffusion.tangents import trig_forward, trig_x0
from turbotrain.diffusion.times import HALF_PI, exact_trig
from turbotrain.diffusion.velocity import Velocity
from turbotrain.losses.common import LossOutput, keep, sample_mean, sample_sum


def backward_simulation(
    student: Velocity,
    noise_BE: Tensor,
    draws: Sequence[Tensor] = (),
    noises: Sequence[Tensor] = (),
    t_start_B: Tensor | None = None,
) -> Tensor:
    """G (B, E): the student's sample after 1 + len(draws) steps from pure noise at t = pi/2, with gradient through
    the last only.

    t_start_B: another TrigFlow time to start from; `noise_BE` is then the noisy latent there.

    draws: TrigFlow times (B,), one per re-noising; each is lowered to the time before it if it lies above (fixed,
    decreasing inference times pass unchanged). noises: one (B, E) tensor per re-noising: x <- cos t' x0_hat + sin t'
    e_new. Call it under torch.no_grad() for the critic.
    """
    if len(draws) != len(noises):
        raise ValueError(f"one noise per re-noising time is needed, got {len(draws)} draws and {len(noises)} noises")
    pure = torch.full((len(noise_BE),), HALF_PI, dtype=torch.float64, device=noise_BE.device)
    t = pure if t_start_B is None else exact_trig(t_start_B)
    x_t_BE = noise_BE
    for draw_B, new_noise_BE in zip(draws, noises):
        with torch.no_grad():
            x0_BE = trig_x0(student, x_t_BE, t)
            t = torch.minimum(t, exact_trig(draw_B))
            x_t_BE = times.noise_trig(x0_BE, new_noise_BE, t)
    return trig_x0(student, x_t_BE, t)


def dmd(
    generated_BE: Tensor,
    teacher: Velocity,
    fake: Velocity,
    noise_BE: Tensor,
    t_B: Tensor,
    *,
    loss_scale: float = 1.0,
    mask: Tensor | None = None,
) -> LossOutput:
    """loss_scale * sum |G - sg(G - grad)|^2, mean over the batch, with grad = (x0_fake - x0_teacher) / mean |G -
    x0_teacher| at x_t = cos t G + sin t e (method.md, section 4b). `teacher` is guided already; neither score gets a
    gradient. metrics: score_gap, the mean |x0_fake - x0_teacher|."""
    with torch.no_grad():
        x_t_BE = times.noise_trig(generated_BE, noise_BE, t_B)
        teacher_x0_BE = trig_x0(teacher, x_t_BE, t_B)
        gap_BE = keep(trig_x0(fake, x_t_BE, t_B) - teacher_x0_BE, mask)
        weight_B = sample_mean((generated_BE - teacher_x0_BE).abs(), mask).clamp(min=1e-5)
        target_BE = generated_BE - gap_BE / weight_B.reshape(-1, *[1] * (gap_BE.ndim - 1))
    loss_B = loss_scale * sample_sum((generated_BE - target_BE).square(), mask)
    return LossOutput.of(loss_B, score_gap=sample_mean(gap_BE.abs(), mask).mean())


def critic(
    fake: Velocity, generated_BE: Tensor, noise_BE: Tensor, t_B: Tensor, *, mask: Tensor | None = None
) -> LossOutput:
    """sum |F_fake(x_t, t) - (cos t e - sin t G)|^2, mean over the batch; G gets no gradient (method.md, section 4c)."""
    generated_BE = generated_BE.detach()
    x_t_BE = times.noise_trig(generated_BE, noise_BE, t_B)
    target_BE = times.trig_target(generated_BE, noise_BE, t_B)
    f_BE = trig_forward(fake, x_t_BE, t_B).f
    return LossOutput.of(sample_sum((f_BE - target_BE).square(), mask))
