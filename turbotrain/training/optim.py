"""Optimisers and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from turbotrain.config import OptimSection


def make_optimizer(parameters: Iterable[nn.Parameter], optim: OptimSection) -> torch.optim.AdamW:
    """AdamW, `optim.fused` or not, with its state in place."""
    optimizer = new_adamw(parameters, optim)
    allocate_state(optimizer, optimizer.param_groups[0]["params"])
    return optimizer


def new_adamw(parameters: Iterable[nn.Parameter], optim: OptimSection) -> torch.optim.AdamW:
    """AdamW as torch makes it: its state comes with the first step."""
    trained = [p for p in parameters if p.requires_grad]
    first, second = optim.betas
    fused = optim.fused and all(p.is_cuda for p in trained)
    return torch.optim.AdamW(
        trained, lr=optim.lr, betas=(first, second), eps=optim.eps, weight_decay=optim.weight_decay, fused=fused
    )


def allocate_state(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Make the state of these parameters now, so that memory is known before training begins and a saved state has something
    to fill."""
    fused = bool(optimizer.defaults["fused"])
    for p in parameters:
        # A fused AdamW keeps its step count on the parameter's device, a plain one on the CPU.
        step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def learning_rate(optim: OptimSection, steps: int) -> Callable[[int], float]:
    """lr as a function of the step: linear warm-up, then constant or a cosine to zero at `steps`."""

    def at(step: int) -> float:
        warm = min(1.0, (step + 1) / (optim.warmup_steps + 1))
        fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if optim.decay == "cosine" else 1.0
        return optim.lr * warm * fall

    return at
