"""Consistency losses: continuous-time (sCM / rCM) and discrete-time (method.md, section 4a; arXiv 2410.11081,
2510.08431).

The student's F is a consistency function's: x0(x_t, t) = cos t x_t - sin t F must not change along the teacher's ODE
dx/dt = F_T. scm differentiates that statement, dcm compares two points of a grid.

Shapes: B batch; E a sample's own dimensions (C, T, H, W for video latents).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from turbotrain.diffusion import times
from turbotrain.diffusion.tangents import trig_finite_difference, trig_forward, trig_jvp, trig_x0
from turbotrain.diffusion.times import exact_trig, per_sample
from turbotrain.diffusion.velocity import Velocity
from turbotrain.losses.common import LossOutput, keep, sample_sum

TangentForm = Literal["rcm", "scm"]
TangentMethod = Literal["jvp", "finite_difference"]


def consistency_tangent(
    f_BE: Tensor,
    f_teacher_BE: Tensor,
    f_dot_BE: Tensor,
    x_t_BE: Tensor,
    t_B: Tensor,
    r: float | Tensor,
    form: TangentForm = "rcm",
) -> Tensor:
    """g (B, E), the direction in which F_theta should move, before normalisation. f_dot = cos t sin t dF/dt; r:
    warm-up ratio. At r = 1 both forms are cos t d x0(x_t, t)/dt along the ODE, so g = 0 exactly at a consistency
    function."""
    t = exact_trig(t_B)
    sin_cos = t.sin() * t.cos()
    if form == "rcm":
        pull = t.cos() * (1 - (r * t.sin()) ** 2).clamp(min=0).sqrt()
        return -per_sample(pull, x_t_BE) * (f_BE - f_teacher_BE) - (per_sample(r * sin_cos, x_t_BE) * x_t_BE + f_dot_BE)
    if form == "scm":
        pull = t.cos() ** 2
        return -per_sample(pull, x_t_BE) * (f_BE - f_teacher_BE) - r * (per_sample(sin_cos, x_t_BE) * x_t_BE + f_dot_BE)
    raise ValueError(f"tangent form must be 'rcm' or 'scm', got {form!r}")


def scm(
    student: Velocity,
    teacher: Velocity,
    x0_BE: Tensor,
    noise_BE: Tensor,
    t_B: Tensor,
    warmup_ratio: float | Tensor = 1.0,
    *,
    tangent: TangentMethod = "jvp",
    form: TangentForm = "rcm",
    loss_scale: float = 100.0,
    mask: Tensor | None = None,
    h: float = 1e-4,
) -> LossOutput:
    """L_cm = loss_scale * sum |F_theta - F- - g/(||g|| + 0.1)|^2, mean over the batch (method.md, section 4a).

    `teacher` is guided already. With `tangent="jvp"` one student evaluation gives F_theta, F- (the same values
    without graph) and the tangent; "finite_difference" adds two evaluations without gradient that reuse the block
    lists chosen at (x_t, t). A sample whose g or F holds a NaN or Inf contributes zero and is counted (the mean stays
    over all B samples, so that ranks weigh alike). A NaN that the network's own activations hold can still reach the
    weights' gradient: check it before stepping. metrics: dropped (samples), tangent_norm (mean ||g|| of those kept).
    """
    t = exact_trig(t_B)
    x_t_BE = times.noise_trig(x0_BE, noise_BE, t)
    with torch.no_grad():
        f_teacher_BE = trig_forward(teacher, x_t_BE, t).f
    sin_cos = t.sin() * t.cos()
    if tangent == "jvp":
        f_BE, f_dot_BE, _ = trig_jvp(student, x_t_BE, t, per_sample(sin_cos, x_t_BE) * f_teacher_BE, sin_cos)
        assert f_dot_BE is not None
    elif tangent == "finite_difference":
        f_BE, _, blocks = trig_forward(student, x_t_BE, t, return_selection=True)
        slope_BE = trig_finite_difference(student, x_t_BE, t, f_teacher_BE, selection=blocks, h=h)
        f_dot_BE = per_sample(sin_cos, x_t_BE) * slope_BE
    else:
        raise ValueError(f"tangent must be 'jvp' or 'finite_difference', got {tangent!r}")

    with torch.no_grad():
        f_minus_BE = f_BE.detach()
        g_BE = keep(consistency_tangent(f_minus_BE, f_teacher_BE, f_dot_BE, x_t_BE, t, warmup_ratio, form), mask)
        norm_B = g_BE.flatten(1).norm(dim=1)
        good_B = norm_B.isfinite() & keep(f_minus_BE, mask).isfinite().flatten(1).all(1)
        g_BE = g_BE / (norm_B + 0.1).reshape(-1, *[1] * (g_BE.ndim - 1))

    good = good_B.reshape(-1, *[1] * (g_BE.ndim - 1))
    counted = good if mask is None else good & mask
    loss_B = loss_scale * sample_sum(keep(f_BE - (f_minus_BE + g_BE), counted).square())
    norm = torch.where(good_B, norm_B, 0).sum() / good_B.sum().clamp(min=1)
    return LossOutput.of(loss_B, dropped=(~good_B).sum(), tangent_norm=norm)


def dcm(
    student: Velocity,
    teacher: Velocity,
    x0_BE: Tensor,
    noise_BE: Tensor,
    index_B: Tensor,
    offset_B: Tensor,
    *,
    steps: int = 48,
    shift: float = 5.0,
    loss_scale: float = 100.0,
    target: Velocity | None = None,
    mask: Tensor | None = None,
) -> LossOutput:
    """Discrete-time consistency: loss_scale * sum |x0(x_t, t) - sg x0(x_t', t')|^2, mean over the batch (method.md,
    section 4a).

    t and t' are neighbours of a grid of `steps` intervals, uniform before the shift and moved by a random fraction of
    an interval: u = (index + 1 - offset) / steps with index in 0..steps-1 and offset in [0, 1), u' = max(u - 1/steps,
    0). The guided teacher steps from t to t' exactly along a TrigFlow arc; at t' = 0 the point itself is the target,
    the boundary condition. `target` answers at t' (default: the student, without gradient); a two-expert model passes
    the switch of both.
    """
    # Of a GPU's numbers nobody asks: every step would wait for them.
    if index_B.device.type == "cpu" and bool(((index_B < 0) | (index_B >= steps)).any()):
        raise ValueError(f"index must lie in 0..{steps - 1} for steps={steps}, got {index_B.tolist()}")
    u_B = (index_B.double() + 1 - offset_B.double()) / steps
    t = times.rf_to_trig(times.shift(u_B, shift))
    t_next = times.rf_to_trig(times.shift((u_B - 1 / steps).clamp(min=0), shift))
    x_t_BE = times.noise_trig(x0_BE, noise_BE, t)
    with torch.no_grad():
        f_teacher_BE = trig_forward(teacher, x_t_BE, t).f
        x_next_BE = times.x0_from_trig(x_t_BE, f_teacher_BE, t - t_next)  # the same arc, by t - t' instead of all of t
        target_BE = trig_x0(target or student, x_next_BE, t_next)
    loss_B = loss_scale * sample_sum((trig_x0(student, x_t_BE, t) - target_BE).square(), mask)
    return LossOutput.of(loss_B)


def boundary_consistency(
    high: Velocity,
    low: Velocity,
    x0_BE: Tensor,
    noise_BE: Tensor,
    boundary: float,
    *,
    loss_scale: float = 1.0,
    mask: Tensor | None = None,
) -> LossOutput:
    """sum |x0_high(x, t_b) - sg x0_low(x, t_b)|^2 at the RF time `boundary`: the boundary condition that a high-noise
    expert trained only at s >= boundary lacks (method.md, section 4f)."""
    t_B = times.rf_to_trig(torch.full((len(x0_BE),), boundary, dtype=torch.float64, device=x0_BE.device))
    x_t_BE = times.noise_trig(x0_BE, noise_BE, t_B)
    with torch.no_grad():
        target_BE = trig_x0(low, x_t_BE, t_B)
    return LossOutput.of(loss_scale * sample_sum((trig_x0(high, x_t_BE, t_B) - target_BE).square(), mask))
