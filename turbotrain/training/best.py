"""Which state of a stage's last phase was the best, by the mean of one metric over the steps since the regular save before it.

Only what measures the same is compared: a phase of other losses begins anew, and means are of windows of `every` steps. A state
that a signal asks for, or that ends a stage between two regular saves, neither ends a window nor is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """metric: a name of metrics.jsonl, the lower the better; empty: nothing is compared. every: steps between regular saves. The
    same on every process, and saved with each state, window and all, so that a resumed run compares alike."""

    def __init__(self, metric: str, every: int) -> None:
        self.metric, self.every = metric, every
        self._begin("", 0)

    def _begin(self, phase: str, step: int) -> None:
        self.step: int | None = None
        self._value = math.inf
        self._phase, self._since = phase, step
        self._sum, self._count = 0.0, 0

    def see(self, step: int, phase: str, values: Mapping[str, float | str]) -> None:
        """The metrics of step number `step`; those without this one (another role's, say) do not count. phase: of its losses."""
        if phase != self._phase:
            self._begin(phase, step)
        value = values.get(self.metric)
        if isinstance(value, float) and math.isfinite(value):
            self._sum, self._count = self._sum + value, self._count + 1

    def judge(self, step: int) -> None:
        """A state is about to be saved after `step` steps."""
        if step % self.every:
            return
        if self._count and step - self._since >= self.every and self._sum / self._count < self._value:
            self.step, self._value = step, self._sum / self._count
        self._since = step
        self._sum, self._count = 0.0, 0

    def found(self) -> dict[str, Any]:
        """What the best state was: {"metric", "step", "value"}, or {}."""
        return {} if self.step is None else {"metric": self.metric, "step": self.step, "value": self._value}

    def state(self) -> dict[str, Any]:
        window = {"phase": self._phase, "since": self._since, "sum": self._sum, "count": self._count}
        return {**self.found(), "metric": self.metric, "every": self.every, **window} if self.metric else {}

    def load(self, state: Mapping[str, Any], there: list[int], step: int) -> None:
        """there: the steps that have a state. A best whose state is gone, or that was judged by another metric or by windows of
        another length, is forgotten. step: how many were taken."""
        self._begin("", step)
        if (state.get("metric"), state.get("every")) != (self.metric, self.every):
            return
        self._phase, self._since = state["phase"], state["since"]
        self._sum, self._count = state["sum"], state["count"]
        if state.get("step") in there:
            self.step, self._value = state["step"], state["value"]
