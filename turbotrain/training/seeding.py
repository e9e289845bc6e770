"""Randomness of a training step, derived from (seed, stream, step, row of the global batch) and nothing else.

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
    """The draws of one rank's share of one step: rows `positions` of the global batch at `step`.

    Every rank draws for the whole batch and keeps its rows: cheaper than one generator a sample, and the same numbers
    whatever the number of processes.
    """

    def __init__(self, seed: int, step: int, batch_size: int, positions: range, device: torch.device) -> None:
        self.seed = seed
        self.step = step
        self.batch_size = batch_size
        self.rows = slice(positions.start, positions.stop)
        self.device = device

    def _generator(self, stream: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(derive_seed(self.seed, stream, self.step))

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal (B, *shape) float32; `stream` names the use, each use gets numbers of its own."""
        whole = (self.batch_size, *shape)
        return torch.randn(whole, generator=self._generator(stream), device=self.device)[self.rows]

    def uniform(self, stream: str) -> Tensor:
        """Uniform on [0, 1), (B,) float64."""
        whole = torch.rand(self.batch_size, generator=self._generator(stream), device=self.device, dtype=torch.float64)
        return whole[self.rows]


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The permutation of a data set of `count` samples in one epoch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()
