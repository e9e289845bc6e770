"""Randomness of a training step, derived from (seed, stream, step, sample index) and nothing else.

So an interrupted run continues with the very draws that it would have made, and two ranks see the noise that one process
would have seen for the same global batch: losses agree to rounding whatever the number of processes.

Legend: B batch, C channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, stream: str, *numbers: int) -> int:
    """A 63-bit seed that depends on every argument; `stream` names the use ("noise", "times", ...)."""
    text = ":".join([str(seed), stream, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class StepRandom:
    """The draws of one rank's share of one step: sample `positions` of the global batch at `step`."""

    def __init__(self, seed: int, step: int, positions: Sequence[int], device: torch.device) -> None:
        self.seed = seed
        self.step = step
        self.positions = list(positions)
        self.device = device

    def _generators(self, stream: str) -> list[torch.Generator]:
        seeds = (derive_seed(self.seed, stream, self.step, position) for position in self.positions)
        return [torch.Generator(self.device).manual_seed(value) for value in seeds]

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal (B, *shape) float32, one generator a sample."""
        draws = [torch.randn(tuple(shape), generator=g, device=self.device) for g in self._generators(stream)]
        return torch.stack(draws)

    def uniform(self, stream: str) -> Tensor:
        """Uniform on [0, 1), (B,) float64."""
        draws = [torch.rand((), generator=g, device=self.device, dtype=torch.float64) for g in self._generators(stream)]
        return torch.stack(draws)


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The permutation of a data set of `count` samples in one epoch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()
