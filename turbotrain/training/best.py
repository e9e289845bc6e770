"""Which state of a stage was the best, by the mean of one metric over the steps since the state before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """metric: a name of metrics.jsonl, the lower the better; empty: nothing is compared. The same on every process, and saved
    with each state, so that a resumed run compares alike."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.step: int | None = None
        self._value = math.inf
        self._sum, self._count = 0.0, 0

    def see(self, values: Mapping[str, float | str]) -> None:
        """One step's metrics; steps without this one (another role's, say) do not count."""
        value = values.get(self.metric)
        if isinstance(value, float) and math.isfinite(value):
            self._sum, self._count = self._sum + value, self._count + 1

    def judge(self, step: int) -> None:
        """A state is about to be saved after `step` steps."""
        if self._count and self._sum / self._count < self._value:
            self.step, self._value = step, self._sum / self._count
        self._sum, self._count = 0.0, 0

    def state(self) -> dict[str, Any]:
        return {} if self.step is None else {"metric": self.metric, "step": self.step, "value": self._value}

    def load(self, state: Mapping[str, Any], there: list[int]) -> None:
        """there: the steps that have a state. One that is gone, or was judged by another metric, is forgotten."""
        self.__init__(self.metric)
        if state.get("metric") == self.metric and state["step"] in there:
            self.step, self._value = state["step"], state["value"]
