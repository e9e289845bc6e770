"""Worlds where the answers are known: closed-form teachers, consistency functions and a network small enough to distil.

Shapes: B batch; D the dimension of a sample; K mixture components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from turbotrain.diffusion.times import rf_to_trig, timestep_to_rf
from turbotrain.diffusion.velocity import Tangents, Velocity, VelocityOutput, from_function


@dataclass(frozen=True)
class GaussianWorld:
    """Data x0 ~ N(mean, diag(std^2)); mean and std (D,), or scalars (isotropic)."""

    mean: Tensor
    std: Tensor

    def data(self, noise_BD: Tensor) -> Tensor:
        return self.mean + self.std * noise_BD

    def teacher(self) -> Velocity:
        """E[e - x0 | x_s]: the marginal of x_s is N((1-s) mean, (1-s)^2 std^2 + s^2)."""

        def velocity(x_s_BD: Tensor, timestep_B: Tensor) -> Tensor:
            s = _column(timestep_to_rf(timestep_B), x_s_BD)
            whitened = (x_s_BD - (1 - s) * self.mean) / ((1 - s).square() * self.std**2 + s.square())
            x0 = self.mean + (1 - s) * self.std**2 * whitened
            return s * whitened - x0

        return from_function(velocity)

    def student(self) -> Velocity:
        """The exact consistency function: along the probability-flow ODE a point keeps its quantile, so that
        x0 = mean + std (x_t - cos t mean) / sqrt(cos^2 t std^2 + sin^2 t); as a velocity v = (x_s - x0) / s, with
        the limit -x_s at s = 0."""

        def velocity(x_s_BD: Tensor, timestep_B: Tensor) -> Tensor:
            s = _column(timestep_to_rf(timestep_B), x_s_BD)
            spread = ((1 - s).square() * self.std**2 + s.square()).sqrt()
            x0 = self.mean + self.std * (x_s_BD - (1 - s) * self.mean) / spread
            return torch.where(s > 0, (x_s_BD - x0) / torch.where(s > 0, s, 1), -x_s_BD)

        return from_function(velocity)


@dataclass(frozen=True)
class MixtureWorld:
    """Data from a mixture of K isotropic Gaussians: centres (K, D), one std, weights (K,)."""

    centres_KD: Tensor
    std: float
    weights_K: Tensor

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        component = torch.multinomial(self.weights_K, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.centres_KD.shape[1], generator=generator, dtype=self.centres_KD.dtype)
        return self.centres_KD[component] + self.std * noise

    def teacher(self) -> Velocity:
        """E[e - x0 | x_s], the posterior mean over components."""

        def velocity(x_s_BD: Tensor, timestep_B: Tensor) -> Tensor:
            s = _column(timestep_to_rf(timestep_B), x_s_BD)
            a, variance = 1 - s, (1 - s).square() * self.std**2 + s.square()
            offset_BKD = x_s_BD[:, None] - a[:, None] * self.centres_KD
            logits_BK = self.weights_K.to(x_s_BD).log() - offset_BKD.square().sum(-1) / (2 * variance)
            weight_BK1 = torch.softmax(logits_BK, dim=1)[..., None]
            whitened_BKD = offset_BKD / variance[:, None]
            x0_BKD = self.centres_KD + a[:, None] * self.std**2 * whitened_BKD
            return (weight_BK1 * (s[:, None] * whitened_BKD - x0_BKD)).sum(1)

        return from_function(velocity)


class TinyVelocity(nn.Module):
    """An MLP velocity over D numbers, with explicit tangents like the DiT's; itself a Velocity (no conditioning)."""

    def __init__(self, dim: int = 2, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        sizes = [dim + 8, *[width] * layers, dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.frequencies = math.pi * torch.arange(1, 5) / 2

    def forward(
        self,
        x_s_BD: Tensor,
        timestep_B: Tensor,
        *,
        tangents: Tangents | None = None,
        selection: Any = None,
        return_selection: bool = False,
    ) -> VelocityOutput:
        dtype = next(self.parameters()).dtype
        # the network reads the angle t / (pi/2), in which its targets vary evenly
        s_B = timestep_to_rf(timestep_B)
        phase_BF = (rf_to_trig(s_B) / (math.pi / 2))[:, None] * self.frequencies
        h = torch.cat([x_s_BD.to(dtype), phase_BF.sin().to(dtype), phase_BF.cos().to(dtype)], dim=1)
        dh = None
        if tangents is not None:
            with torch.no_grad():
                ds_B = timestep_to_rf(tangents[1])
                dphase_BF = (ds_B / ((1 - s_B) ** 2 + s_B**2) / (math.pi / 2))[:, None] * self.frequencies
                dsin, dcos = phase_BF.cos() * dphase_BF, -phase_BF.sin() * dphase_BF
                dh = torch.cat([tangents[0].to(dtype), dsin.to(dtype), dcos.to(dtype)], dim=1)
        for i, layer in enumerate(self.layers):
            h = layer(h)
            if dh is not None:
                with torch.no_grad():
                    dh = nn.functional.linear(dh, cast(nn.Linear, layer).weight)
            if i + 1 < len(self.layers):
                if dh is not None:
                    with torch.no_grad():
                        gate = h.sigmoid()
                        dh = dh * gate * (1 + h * (1 - gate))
                h = nn.functional.silu(h)
        wide = torch.float64 if x_s_BD.dtype == torch.float64 else torch.float32
        return VelocityOutput(h.to(wide), None if dh is None else dh.to(wide))


def _column(s_B: Tensor, x_BD: Tensor) -> Tensor:
    return s_B.to(x_BD.dtype)[:, None]
