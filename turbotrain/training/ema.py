"""Exponential moving average of weights with the power profile (arXiv 2312.02696; method.md, section 4e).

beta_i = (1 - 1/(i+1))^(gamma+1) weighs the past by i^gamma: the average covers a fixed fraction of training, however
long it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def rate_to_gamma(rate: float) -> float:
    """gamma whose profile has the relative width `rate`: (gamma+1) / ((gamma+2)^2 (gamma+3)) = rate^2; 6.9372 for 0.1.

    The left side falls from 1/12 at gamma = 0, so that rates lie in (0, 0.2887).
    """
    widest = math.sqrt(1 / 12)
    if not 0 < rate < widest:
        raise ValueError(f"EMA rate must lie between 0 and {widest:.4f}, got {rate}")
    low, high = 0.0, 1.0 / rate
    for _ in range(200):  # bisection to the last bit
        middle = (low + high) / 2
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > rate**2:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class PowerEMA:
    """A float32 shadow of named parameters; buffers and integers are copied as they are.

    `source` is an unwrapped module or a mapping of names to tensors. The caller counts updates, so that a resumed run
    goes on with the same betas: a shadow that was saved and filled again continues bit for bit.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor], rate: float = 0.1, gamma: float | None = None) -> None:
        self.gamma = rate_to_gamma(rate) if gamma is None else gamma
        averaged, copied = _split(source)
        self.shadow = {name: p.detach().to(torch.float32, copy=True) for name, p in averaged.items()}
        self.copied = {name: b.detach().clone() for name, b in copied.items()}

    def beta(self, i: int) -> float:
        """Weight of the past at update i: 0 at i = 0, 0.004 at i = 1 (rate 0.1), so that the starting weights soon
        count no more."""
        return (1 - 1 / (i + 1)) ** (self.gamma + 1)

    @torch.no_grad()
    def update(self, source: nn.Module | Mapping[str, Tensor], i: int) -> None:
        """shadow <- beta_i shadow + (1 - beta_i) weights; i: how many times these weights have been updated."""
        averaged, copied = _split(source)
        if averaged.keys() != self.shadow.keys():
            raise ValueError(f"EMA tracks other parameters: {_difference(averaged.keys(), self.shadow.keys())}")
        beta = self.beta(i)
        shadow = list(self.shadow.values())
        # All tensors at once: one by one, a small network's average takes longer to launch than to compute.
        torch._foreach_mul_(shadow, beta)
        torch._foreach_add_(shadow, [averaged[name].detach().to(torch.float32) for name in self.shadow], alpha=1 - beta)
        for name, b in copied.items():
            self.copied[name] = b.detach().clone()

    @torch.no_grad()
    def copy_to(self, target: nn.Module) -> None:
        """Writes the average into a module of the same names, in the module's dtypes."""
        averaged, copied = _split(target)
        if averaged.keys() != self.shadow.keys() or copied.keys() != self.copied.keys():
            here = self.shadow.keys() | self.copied.keys()
            raise ValueError(f"EMA tracks another model: {_difference(averaged.keys() | copied.keys(), here)}")
        for name, tensor in (averaged | copied).items():
            tensor.copy_(self.shadow[name] if name in self.shadow else self.copied[name])


def _split(source: nn.Module | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(averaged, copied): floating-point parameters, and everything else that a state dict holds."""
    if not isinstance(source, nn.Module):
        averaged = {k: v for k, v in source.items() if v.is_floating_point()}
        return averaged, {k: v for k, v in source.items() if k not in averaged}
    averaged: dict[str, Tensor] = {k: p for k, p in source.named_parameters() if p.is_floating_point()}
    return averaged, {k: v for k, v in source.state_dict(keep_vars=True).items() if k not in averaged}


def _difference(theirs: Any, mine: Any) -> str:
    extra, missing = sorted(theirs - mine), sorted(mine - theirs)
    return f"unexpected {extra[:5]}, missing {missing[:5]}"
