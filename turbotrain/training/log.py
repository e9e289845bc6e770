"""What a stage says while it trains: metrics.jsonl, a progress bar or lines, and accelerate's trackers. Rank 0 only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from turbotrain.checkpoint.atomic import new_file


class StageLog:
    """Context manager over one stage's training; `record` is called once a step."""

    def __init__(self, folder: Path, title: str, steps: int, start: int, every: int, accelerator: Accelerator) -> None:
        self.path = folder / "metrics.jsonl"
        self.title = title
        self.steps = steps
        self.start = start
        self.every = every
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.bar: Progress | None = None

    def __enter__(self) -> StageLog:
        self.began = time.perf_counter()
        if not self.main:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.tracker.define_metric(f"{self.title}/*", step_metric=f"{self.title}/step")
        truncate_metrics(self.path, self.start)
        self.file = self.path.open("a")
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self.bar.start()
            self.row = self.bar.add_task(self.title, total=self.steps, completed=self.start)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.main:
            self.file.close()
        if self.bar:
            self.bar.stop()

    def rewind(self, step: int, why: str) -> None:
        """Forget the lines from `step` on, which will be written again, and say why."""
        if self.main:
            self.file.close()
            truncate_metrics(self.path, step)
            self.file = self.path.open("a")
            print(f"{self.title}: {why}", flush=True)

    def record(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write one line of metrics.jsonl for `step`; show every `every`-th."""
        if not self.main:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        numbers = {key: value for key, value in values.items() if not isinstance(value, str)}
        self._track(step, {f"{self.title}/{key}": value for key, value in numbers.items()})
        done = step + 1
        shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items() if key in ("loss", "grad_norm"))
        if self.bar:
            self.bar.update(self.row, completed=done, description=f"{self.title}  {shown}")
        elif done % self.every == 0 or done == self.steps:
            rate = (time.perf_counter() - self.began) / (done - self.start)
            left = rate * (self.steps - done)
            print(f"{self.title} {done}/{self.steps}  {shown}  {rate * 1e3:.0f} ms/step  {left:.0f} s left", flush=True)

    def _track(self, step: int, numbers: Mapping[str, float]) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                # Its own steps only grow, while a run's stages each begin at 0: what lies behind would be dropped.
                tracker.log({**numbers, f"{self.title}/step": step})
            else:
                tracker.log(numbers, step=step)


def truncate_metrics(path: Path, start: int) -> None:
    """Drop the lines that a resumed stage will write again, and a line torn by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError):
            continue
        if step < start:
            kept.append(line + "\n")
    with new_file(path) as new:
        new.write_text("".join(kept))
