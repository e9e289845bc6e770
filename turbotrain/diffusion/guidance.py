"""Classifier-free guidance and the switch between two experts, both as velocities built from velocities (method.md,
section 2).

Shapes: B batch; E a sample's own dimensions (C, T, H, W for video latents); L text tokens; D their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbotrain.diffusion.velocity import BoundVelocity, Tangents, Velocity, VelocityOutput


@dataclass(frozen=True)
class GuidedVelocity:
    """v_u + w (v_c - v_u) (build it with `guided`)."""

    cond: Velocity
    uncond: Velocity
    scale: float

    def __call__(
        self,
        x_s_BE: Tensor,
        timestep_B: Tensor,
        *,
        tangents: Tangents | None = None,
        selection: Any = None,
        return_selection: bool = False,
    ) -> VelocityOutput:
        cond_selection, uncond_selection = (None, None) if selection is None else selection
        cond = self.cond(
            x_s_BE, timestep_B, tangents=tangents, selection=cond_selection, return_selection=return_selection
        )
        uncond = self.uncond(
            x_s_BE, timestep_B, tangents=tangents, selection=uncond_selection, return_selection=return_selection
        )
        return _combine(cond, uncond, self.scale, (cond.selection, uncond.selection))


@dataclass(frozen=True)
class BatchedGuidedVelocity:
    """The same in one network call of twice the batch: conditional rows first (build it with `guided`)."""

    both: BoundVelocity
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        return self.both.dtype

    def __call__(
        self,
        x_s_BE: Tensor,
        timestep_B: Tensor,
        *,
        tangents: Tangents | None = None,
        selection: Any = None,
        return_selection: bool = False,
    ) -> VelocityOutput:
        twice = None if tangents is None else (_twice(tangents[0]), _twice(tangents[1]))
        out = self.both(
            _twice(x_s_BE),
            _twice(timestep_B),
            tangents=twice,
            selection=selection,
            return_selection=return_selection,
        )
        v_c, v_u = out.v.chunk(2)
        t_c, t_u = (None, None) if out.tangent is None else out.tangent.chunk(2)
        return _combine(VelocityOutput(v_c, t_c), VelocityOutput(v_u, t_u), self.scale, out.selection)


def guided(cond: Velocity, uncond: Velocity, scale: float, batched: bool = True) -> Velocity:
    """Guided velocity v_u + scale (v_c - v_u); scale 1 is `cond` alone, one call.

    Two bindings of one model whose conditioning has equal shapes are evaluated in one call of batch 2B, unless
    `batched` is false (half the peak memory).
    """
    if scale == 1:
        return cond
    if batched and isinstance(cond, BoundVelocity) and isinstance(uncond, BoundVelocity):
        both = _stack(cond, uncond)
        if both is not None:
            return BatchedGuidedVelocity(both, scale)
    return GuidedVelocity(cond, uncond, scale)


@dataclass(frozen=True)
class ExpertSwitch:
    """The high-noise expert at and above the boundary, the low-noise one below (build it with `switch_experts`)."""

    high: Velocity
    low: Velocity
    boundary: float
    always_both: bool = False

    def __call__(
        self,
        x_s_BE: Tensor,
        timestep_B: Tensor,
        *,
        tangents: Tangents | None = None,
        selection: Any = None,
        return_selection: bool = False,
    ) -> VelocityOutput:
        high_selection, low_selection = (None, None) if selection is None else selection
        is_high_B = timestep_B >= 1000.0 * self.boundary

        def evaluate(expert: Velocity, chosen: Any) -> VelocityOutput:
            return expert(x_s_BE, timestep_B, tangents=tangents, selection=chosen, return_selection=return_selection)

        # A sampler's batch shares one time: one network runs. Training batches may straddle the boundary: both run,
        # and each sample keeps its expert's answer (conditioning is bound per batch and cannot be split here).
        high = evaluate(self.high, high_selection) if self.always_both or bool(is_high_B.any()) else None
        needs_low = self.always_both or high is None or not bool(is_high_B.all())
        low = evaluate(self.low, low_selection) if needs_low else None
        if high is None or low is None:
            one = low if high is None else high
            assert one is not None
            return one._replace(
                selection=(None if high is None else one.selection, None if low is None else one.selection)
            )
        choose = is_high_B.reshape(-1, *[1] * (x_s_BE.ndim - 1))
        tangent = None
        if high.tangent is not None and low.tangent is not None:
            tangent = torch.where(choose, high.tangent, low.tangent)
        return VelocityOutput(torch.where(choose, high.v, low.v), tangent, (high.selection, low.selection))


def switch_experts(high: Velocity, low: Velocity, boundary: float, always_both: bool = False) -> Velocity:
    """Two-expert models (Wan2.2 A14B): `high` where 1000 s >= 1000 boundary. Each expert carries its own guidance
    scale.

    always_both: ask both whatever the times. Sharded networks need it: a pass is a collective, and processes whose samples lie
    on different sides would gather weights of different networks.
    """
    if not 0 < boundary < 1:
        raise ValueError(f"boundary must lie between 0 and 1 (RF time), got {boundary}")
    return ExpertSwitch(high, low, boundary, always_both)


def _combine(cond: VelocityOutput, uncond: VelocityOutput, scale: float, selection: Any) -> VelocityOutput:
    tangent = None
    if cond.tangent is not None and uncond.tangent is not None:
        tangent = uncond.tangent + scale * (cond.tangent - uncond.tangent)
    return VelocityOutput(uncond.v + scale * (cond.v - uncond.v), tangent, selection)


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])


def _stack(cond: BoundVelocity, uncond: BoundVelocity) -> BoundVelocity | None:
    """Both bindings as one of twice the batch, or None where they differ in more than values."""
    if cond.model is not uncond.model or cond.conditioning.keys() != uncond.conditioning.keys():
        return None
    pairs = {k: (cond.conditioning[k], uncond.conditioning[k]) for k in cond.conditioning}
    pairs["context"] = (cond.context_BLD, uncond.context_BLD)
    pairs["clean"] = (cond.clean_BCTHW, uncond.clean_BCTHW)
    pairs["clean_frames"] = (cond.clean_frames_BT, uncond.clean_frames_BT)
    stacked: dict[str, Any] = {}
    for name, (a, b) in pairs.items():
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape:
                return None
            stacked[name] = torch.cat([a, b])
        elif a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b):
            stacked[name] = a
        else:
            return None
    context_BLD, clean_BCTHW, clean_frames_BT = (stacked.pop(name) for name in ("context", "clean", "clean_frames"))
    return BoundVelocity(cond.model, context_BLD, clean_BCTHW, clean_frames_BT, stacked, cond.encode_once)
