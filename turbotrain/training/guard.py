"""Which steps are not taken: losses and gradients that are not finite, or far from those before them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from turbotrain.config import GuardSection

WINDOW = 100
ENOUGH = 20  # steps before a limit means anything


class Guard:
    """Judges each step by the medians of the last good ones of its role. The same on every process, and saved with the state,
    so that a resumed run judges alike."""

    def __init__(self, section: GuardSection) -> None:
        self.section = section
        self._history: dict[str, deque[tuple[float, float]]] = {}

    def objection(self, role: str, loss: float, norm: float, lost: float) -> str:
        """Why a step must not be taken; empty for a good one, which is remembered.

        lost: the share of samples that taught nothing.
        """
        if not math.isfinite(loss) or not math.isfinite(norm):
            return "loss or gradient is not finite"
        if lost >= 1:
            return "every sample was dropped"
        history = self._history.setdefault(role, deque(maxlen=WINDOW))
        if len(history) >= ENOUGH:
            for index, (name, value, factor) in enumerate(
                (("loss", abs(loss), self.section.max_loss), ("gradient norm", norm, self.section.max_grad_norm))
            ):
                usual = median(entry[index] for entry in history)
                if factor and value > factor * usual:
                    return f"{name} {value:.4g} is more than {factor:g} times the usual {usual:.4g}"
        history.append((abs(loss), norm))
        return ""

    def state(self) -> dict[str, Any]:
        return {role: list(history) for role, history in self._history.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        self._history = {role: deque(map(tuple, history), maxlen=WINDOW) for role, history in state.items()}
