"""Exponential moving average of weights with the power profile (arXiv 2312.02696; method.md, section 4e).

beta_i = (1 - 1/(i+1))^(gamma+1) weighs the past by i^gamma: the average covers a fixed fraction of training, however
long it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


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
    """A float32 shadow of named weights.

    The caller counts updates, so that a resumed run goes on with the same betas: a shadow that was saved and filled again
    continues bit for bit.
    """

    def __init__(self, weights: Mapping[str, Tensor], rate: float = 0.1) -> None:
        self.gamma = rate_to_gamma(rate)
        self.shadow = {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights.items()}

    def beta(self, i: int) -> float:
        """Weight of the past at update i: 0 at i = 0, 0.004 at i = 1 (rate 0.1), so that the starting weights soon
        count no more."""
        return (1 - 1 / (i + 1)) ** (self.gamma + 1)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], i: int) -> None:
        """shadow <- beta_i shadow + (1 - beta_i) weights; i: how many times these weights have been updated.

        Raises:
            ValueError: the weights are not those of the shadow.
        """
        if weights.keys() != self.shadow.keys():
            extra, missing = sorted(weights.keys() - self.shadow.keys()), sorted(self.shadow.keys() - weights.keys())
            raise ValueError(f"EMA tracks other parameters: unexpected {extra[:5]}, missing {missing[:5]}")
        beta = self.beta(i)
        shadow = list(self.shadow.values())
        # All tensors at once: one by one, a small network's average takes longer to launch than to compute.
        torch._foreach_mul_(shadow, beta)
        torch._foreach_add_(shadow, [weights[name].detach().float() for name in self.shadow], alpha=1 - beta)
