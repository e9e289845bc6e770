"""Regression losses on the RF velocity: flow matching for teachers, alignment for SLA students (method.md, sections 2
and 3).

Shapes: B batch; E a sample's own dimensions (C, T, H, W for video latents).
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbotrain.diffusion import times
from turbotrain.diffusion.velocity import Velocity
from turbotrain.losses.common import LossOutput, sample_mean


def flow_matching(
    velocity: Velocity, x0_BE: Tensor, noise_BE: Tensor, s_B: Tensor, mask: Tensor | None = None
) -> LossOutput:
    """Mean over elements of |v(x_s, 1000 s) - (e - x0)|^2, s the RF time (arXiv 2210.02747; method.md, section 2)."""
    x_s_BE = times.noise_rf(x0_BE, noise_BE, s_B)
    v_BE = velocity(x_s_BE, times.rf_to_timestep(s_B)).v
    return LossOutput.of(sample_mean((v_BE - (noise_BE - x0_BE)).square(), mask))


def sla_alignment(
    student: Velocity, teacher: Velocity, x0_BE: Tensor, noise_BE: Tensor, s_B: Tensor, mask: Tensor | None = None
) -> LossOutput:
    """White-box SLA training: mean |v_student - v_teacher|^2 at equal inputs (method.md, section 3).
    metrics: relative_error, |v_student - v_teacher| / |v_teacher| over the batch."""
    x_s_BE, timestep_B = times.noise_rf(x0_BE, noise_BE, s_B), times.rf_to_timestep(s_B)
    with torch.no_grad():
        target_BE = teacher(x_s_BE, timestep_B).v
    error_B = sample_mean((student(x_s_BE, timestep_B).v - target_BE).square(), mask)
    scale = sample_mean(target_BE.square(), mask).mean()
    return LossOutput.of(error_B, relative_error=(error_B.mean() / scale).sqrt())
