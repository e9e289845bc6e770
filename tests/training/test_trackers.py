"""What trackers are told: every step of every stage, also where a tracker's own steps may only grow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recipe_world import train_here
from tiny_world import tiny_arguments, tiny_world

from turbotrain.training.log import StageLog


class Tracker:
    """Takes what accelerate's trackers take; like wandb's it drops what lies behind its last step."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: list[dict[str, float]] = []
        self.axes: dict[str, str] = {}
        self.tracker = SimpleNamespace(define_metric=lambda names, step_metric: self.axes.update({names: step_metric}))
        self._last = -1

    def log(self, values: Mapping[str, float], step: int | None = None, **more: Any) -> None:
        step = self._last + 1 if step is None else step
        if self.name == "wandb" and step < self._last:
            return
        self._last = step
        self.kept.append({**values, "own step": step})


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_no_step_of_a_second_stage_is_lost(name: str, tmp_path: Path) -> None:
    tracker = Tracker(name)
    accelerator: Any = SimpleNamespace(is_main_process=True, trackers=[tracker])
    for stage, steps in (("sla", 5), ("rcm", 3)):
        with StageLog(tmp_path / stage, stage, steps, 0, 100, accelerator) as log:
            for step in range(steps):
                log.record(step, {"loss": float(step), "role": "student"})
    axis = "step" if name == "wandb" else "own step"
    for stage, steps in (("sla", 5), ("rcm", 3)):
        lines = [line for line in tracker.kept if f"{stage}/loss" in line]
        assert [line[f"{stage}/loss"] for line in lines] == list(range(steps))
        assert [line[f"{stage}/{axis}" if name == "wandb" else axis] for line in lines] == list(range(steps))
    assert tracker.axes == ({"sla/*": "sla/step", "rcm/*": "rcm/step"} if name == "wandb" else {})


def test_tensorboard_files_hold_both_stages(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard, an extra, is not installed"
    )
    world = tiny_world(tmp_path / "world")
    assert train_here(*tiny_arguments(world, tmp_path, "logging.trackers=[tensorboard]")) == 0
    (folder,) = {path.parent for path in (tmp_path / "run").glob("*/events.out.*")}
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    for stage, steps in (("sla", 2), ("rcm", 4)):
        assert [entry.step for entry in events.Scalars(f"{stage}/loss")] == list(range(steps))
