"""What every loss returns, and how conditioning tokens are left out.

Shapes: B batch; E a sample's own dimensions (C, T, H, W for video latents).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar to differentiate, the mean of per_sample. per_sample (B,): detached values. metrics: detached
    scalars to log."""

    loss: Tensor
    per_sample: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, loss_B: Tensor, **metrics: Tensor) -> LossOutput:
        return cls(loss_B.mean(), loss_B.detach(), {name: value.detach() for name, value in metrics.items()})


def keep(x_BE: Tensor, mask: Tensor | None) -> Tensor:
    """x with the elements outside `mask` (boolean, broadcastable to x; None keeps all) set to zero, whatever they were.
    A selection, not a product: a NaN outside the mask reaches neither the loss nor the gradient."""
    return x_BE if mask is None else torch.where(mask, x_BE, torch.zeros((), dtype=x_BE.dtype, device=x_BE.device))


def sample_sum(x_BE: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) sum over a sample's counted elements."""
    return keep(x_BE, mask).flatten(1).sum(1)


def sample_mean(x_BE: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) mean over a sample's counted elements."""
    if mask is None:
        return x_BE.flatten(1).mean(1)
    count_B = mask.expand_as(x_BE).flatten(1).sum(1).clamp(min=1)
    return sample_sum(x_BE, mask) / count_B
