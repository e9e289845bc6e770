"""What samplers and losses see of a network: a callable from a noisy latent and a timestep to an RF velocity.

Keeping this protocol free of text, images and modules lets every formula of method.md be tested with a closed-form
denoiser, and lets one network serve as student, teacher or critic without knowing it.

Shapes: B batch; E a sample's own dimensions (C, T, H, W for video latents); T latent frames; L tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Tangents = tuple[Tensor, Tensor]


class VelocityOutput(NamedTuple):
    """v (B, E): RF velocity, float32 or better. tangent (B, E): its directional derivative, without a graph.
    selection: the block lists the network chose (opaque: only meant to be handed back to the same velocity)."""

    v: Tensor
    tangent: Tensor | None = None
    selection: Any = None


class Velocity(Protocol):
    """v(x_s, 1000 s). `tangents` = (dx_s, dtimestep) asks for the derivative along that direction; `selection` reuses
    the sparse-attention block lists of an earlier call, `return_selection` asks for this call's."""

    def __call__(
        self,
        x_s_BE: Tensor,
        timestep_B: Tensor,
        /,
        *,
        tangents: Tangents | None = None,
        selection: Any = None,
        return_selection: bool = False,
    ) -> VelocityOutput: ...


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 timesteps near 1000 are 4 apart, and bf16 states lose the last sampling steps: nothing here works below
    float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@dataclass(frozen=True)
class BoundVelocity:
    """A network with everything but the noisy latent and the time filled in (build it with `bind`)."""

    model: nn.Module
    context_BLD: Tensor
    clean_BCTHW: Tensor | None = None
    clean_frames_BT: Tensor | None = None
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    encode_once: bool = False

    @cached_property
    def dtype(self) -> torch.dtype:
        """The network's compute precision: the commonest floating dtype of its parameters, since a bf16 Wan keeps
        float32 islands."""
        dtypes = Counter(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return dtypes.most_common(1)[0][0] if dtypes else torch.float32

    def __call__(
        self,
        x_s_BE: Tensor,
        timestep_B: Tensor,
        *,
        tangents: Tangents | None = None,
        selection: Any = None,
        return_selection: bool = False,
    ) -> VelocityOutput:
        dtype = self.dtype
        options: dict[str, Any] = {}
        time_mask = None
        if self.clean_BCTHW is not None and self.clean_frames_BT is not None:
            frames = _as_frames(self.clean_frames_BT)
            x_s_BE = torch.where(frames, self.clean_BCTHW.to(x_s_BE.dtype), x_s_BE)
            time_mask = self._noisy_tokens(x_s_BE)
            if tangents is not None:
                tangents = (tangents[0].masked_fill(frames, 0), tangents[1])
        timestep = _per_token(at_least_float32(timestep_B), time_mask)
        if tangents is not None:
            dtimestep = _per_token(at_least_float32(tangents[1]), time_mask)
            options["tangents"] = (tangents[0].to(dtype), dtimestep)
        if selection is not None:
            options["selection"] = selection
        if return_selection:
            options["return_selection"] = True

        context, extras = self._network_inputs
        out = self.model(x_s_BE.to(dtype), timestep, context, **extras, **options)

        parts = list(out) if isinstance(out, tuple) else [out]
        chosen = parts.pop() if return_selection else None
        v, tangent = parts[0], parts[1] if tangents is not None else None
        wide = torch.float64 if x_s_BE.dtype == torch.float64 else torch.float32
        return VelocityOutput(v.to(wide), None if tangent is None else tangent.to(wide), chosen)

    @cached_property
    def _network_inputs(self) -> tuple[Any, dict[str, Any]]:
        """Context and conditioning as the network reads them at every call."""
        context = self.context_BLD.to(self.dtype)
        extras = {k: _cast(value, self.dtype) for k, value in self.conditioning.items()}
        encode: Any = getattr(self.model, "encode_context", None) if self.encode_once else None
        return (context, extras) if encode is None else (encode(context, extras.pop("clip_BLD", None)), extras)

    def _noisy_tokens(self, x_BCTHW: Tensor) -> Tensor:
        """(B, L) mask, 0 on tokens of clean frames: they get timestep 0 (raster order: a frame's tokens are
        adjacent)."""
        assert self.clean_frames_BT is not None
        config = getattr(getattr(self.model, "module", self.model), "config", None)
        patch = getattr(config, "patch_size", (1, 2, 2))
        tokens_per_frame = (x_BCTHW.shape[-2] // patch[1]) * (x_BCTHW.shape[-1] // patch[2])
        return (~self.clean_frames_BT).repeat_interleave(tokens_per_frame, dim=1)


def bind(
    model: nn.Module,
    context_BLD: Tensor,
    *,
    clean_BCTHW: Tensor | None = None,
    clean_frames_BT: Tensor | None = None,
    encode_once: bool = False,
    **conditioning: Any,
) -> BoundVelocity:
    """`model(x, timestep, context, **conditioning)` as a Velocity, for WanTransformer and for wrappers such as DDP
    around it.

    The network sees x and the conditioning in its parameters' dtype and the timestep in float32 or better; the
    velocity comes back in float32, or float64 for a float64 x. `clean_BCTHW` with the boolean `clean_frames_BT`
    (TI2V-5B) fixes latent frames: they enter clean, with timestep 0 and zero tangent. What comes out there means
    nothing: exclude those frames from losses (`clean_frame_mask`) and put the clean latents back after sampling.
    `encode_once`, for sampling: a network with `encode_context` reads the text at the first call, and not again.
    """
    if (clean_BCTHW is None) != (clean_frames_BT is None):
        raise ValueError("clean_BCTHW and clean_frames_BT describe one thing: give both or neither")
    return BoundVelocity(model, context_BLD, clean_BCTHW, clean_frames_BT, conditioning, encode_once)


def clean_frame_mask(clean_frames_BT: Tensor) -> Tensor:
    """(B, 1, T, 1, 1) loss mask: False on the latent frames that conditioning fixes."""
    return ~_as_frames(clean_frames_BT)


@dataclass(frozen=True)
class FunctionVelocity:
    """A plain function as a Velocity; the tangent is torch.func.jvp's (build it with `from_function`)."""

    fn: Callable[[Tensor, Tensor], Tensor]

    def __call__(
        self,
        x_s_BE: Tensor,
        timestep_B: Tensor,
        *,
        tangents: Tangents | None = None,
        selection: Any = None,
        return_selection: bool = False,
    ) -> VelocityOutput:
        v = self.fn(x_s_BE, timestep_B)
        if tangents is None:
            return VelocityOutput(v)
        with torch.no_grad():
            primals = (x_s_BE.detach(), timestep_B.detach())
            directions = (tangents[0].to(x_s_BE.dtype), tangents[1].to(timestep_B.dtype))
            tangent = torch.func.jvp(self.fn, primals, directions)[1]
        return VelocityOutput(v, tangent)


def from_function(fn: Callable[[Tensor, Tensor], Tensor]) -> FunctionVelocity:
    """`fn(x_s, timestep) -> v` as a Velocity. `fn` must be differentiable by forward AD; it has no block lists."""
    return FunctionVelocity(fn)


def _as_frames(frames_BT: Tensor) -> Tensor:
    return frames_BT[:, None, :, None, None]


def _per_token(timestep_B: Tensor, noisy_BL: Tensor | None) -> Tensor:
    return timestep_B if noisy_BL is None else timestep_B[:, None] * noisy_BL


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
