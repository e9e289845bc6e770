"""Optimisers and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from turbotrain.config import OptimSection


def make_optimizer(parameters: Iterable[nn.Parameter], optim: OptimSection) -> torch.optim.AdamW:
    """AdamW; the fused form where the parameters are on a GPU."""
    trained = [p for p in parameters if p.requires_grad]
    first, second = optim.betas
    return torch.optim.AdamW(
        trained,
        lr=optim.lr,
        betas=(first, second),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=all(p.is_cuda for p in trained),
    )


def learning_rate(optim: OptimSection, steps: int) -> Callable[[int], float]:
    """lr as a function of the step: linear warm-up, then constant or a cosine to zero at `steps`."""

    def at(step: int) -> float:
        warm = min(1.0, (step + 1) / (optim.warmup_steps + 1))
        fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if optim.decay == "cosine" else 1.0
        return optim.lr * warm * fall

    return at
