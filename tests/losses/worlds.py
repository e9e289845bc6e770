"""Worlds where the answers are known: closed-form teachers, consistency functions and a network small enough to distil.

Shapes: B batch; D the dimension of a sample; K mixture components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

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
    """An MLP velocity over D numbers, with explicit tangents like the DiT's; itself a Velocity (no conditioning).

    `members` > 1: that many independent networks in one, each owning an equal part of the batch, in order. Losses are
    means over samples and optimisers act element by element, so the members train as if alone, at the cost of one.
    """

    def __init__(self, dim: int = 2, width: int = 64, layers: int = 3, members: int = 1) -> None:
        super().__init__()
        self.frequencies = math.pi * torch.arange(1, 5) / 2
        sizes = [dim + 2 * len(self.frequencies), *[width] * layers, dim]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            bound = fan_in**-0.5
            self.weights.append(nn.Parameter(torch.empty(members, fan_in, fan_out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(members, 1, fan_out).uniform_(-bound, bound)))

    def forward(
        self,
        x_s_BD: Tensor,
        timestep_B: Tensor,
        *,
        tangents: Tangents | None = None,
        selection: Any = None,
        return_selection: bool = False,
    ) -> VelocityOutput:
        weights = list(self.weights)
        # the network reads the angle t / (pi/2), in which its targets vary evenly
        s_B = timestep_to_rf(timestep_B)
        phase_BF = (rf_to_trig(s_B) / (math.pi / 2))[:, None] * self.frequencies
        h = self._gather(x_s_BD, phase_BF.sin(), phase_BF.cos())
        dh = None
        if tangents is not None:
            ds_B = timestep_to_rf(tangents[1])
            dphase_BF = (ds_B / ((1 - s_B) ** 2 + s_B**2) / (math.pi / 2))[:, None] * self.frequencies
            dh = self._gather(tangents[0], phase_BF.cos() * dphase_BF, -phase_BF.sin() * dphase_BF).detach()
        for i, (weight, bias) in enumerate(zip(weights, self.biases)):
            h = torch.baddbmm(bias, h, weight)
            dh = None if dh is None else torch.bmm(dh, weight.detach())
            if i + 1 < len(weights):
                if dh is not None:
                    gate = h.detach().sigmoid()
                    dh = dh * gate * (1 + h.detach() * (1 - gate))
                h = nn.functional.silu(h)
        wide = torch.float64 if x_s_BD.dtype == torch.float64 else torch.float32
        flat = [None if x is None else x.reshape(x_s_BD.shape).to(wide) for x in (h, dh)]
        assert flat[0] is not None
        return VelocityOutput(flat[0], flat[1])

    def _gather(self, *features: Tensor) -> Tensor:
        """The network's input (members, B / members, features) in its precision."""
        first = self.weights[0]
        return torch.cat([f.to(first.dtype) for f in features], dim=1).unflatten(0, (len(first), -1))


def _column(s_B: Tensor, x_BD: Tensor) -> Tensor:
    return s_B.to(x_BD.dtype)[:, None]
