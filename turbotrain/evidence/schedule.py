"""Runs a matrix: one queue in the order of importance, several processes on every GPU, and nothing done twice.

A task is a child process: a stage of `train.py`, or the rows of one cell. Both leave whole files or none and continue where they
were stopped, so a schedule that is killed goes on when the same command is given again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from turbotrain.evidence.folders import Folders
from turbotrain.evidence.matrix import Cell
from turbotrain.records import status

LAST_WORDS = 20  # seconds that children get to save what they have
MEASURE = "measure"
BASE = "base"
REFERENCE = "reference"  # the first row, which all others are compared with


@dataclass
class Task:
    """name: `base`, `reference`, `train:CELL` or `measure:CELL`. needs: names of tasks."""

    name: str
    command: list[str]
    needs: list[str]
    log: Path
    state: str = "waiting"  # running | done | failed | skipped
    seconds: float = 0.0


@dataclass
class Outcome:
    """Names of tasks; failed: {name: log}. left: what was ended early, or could not begin."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, Path] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def plan(
    folders: Folders, train: Sequence[str], measure: Sequence[str], common: Sequence[str], only: Sequence[str] = ()
) -> list[Task]:
    """Everything that is still to be done, most important first.

    train: the command in front of a training's overrides. measure: the command in front of a cell's name. common: overrides of
    every training beside the matrix's own. only: names of cells; the others are left out, but for those that these need and
    the first, which all are compared with. A cell whose rows are all there is trained for another's sake alone: checkpoints of
    a finished matrix may be removed.
    """
    matrix = folders.matrix
    logs = folders.root / "logs"
    tasks: list[Task] = []
    cells = _chosen(folders, only)
    if not cells:
        return tasks
    given = folders.given()
    stages = [stage for stage in matrix.base if stage not in given]
    unfinished = [stage for stage in stages if status(folders.base / stage) != "done"]
    own = [f"recipe={matrix.recipe}", f"output_dir={folders.root}", *matrix.common, *common]
    codec = [f"model.codec={given['codec']}"] if "codec" in given else []
    if unfinished:
        overrides = [f"name={folders.base.name}", f"stages=[{','.join(stages)}]", *codec]
        tasks.append(Task(BASE, [*train, *own, *overrides], [], logs / "base.log"))
    first = matrix.cells[0]
    for cell in cells:
        waits = [BASE] if unfinished else []
        waits += [f"train:{name}" for name in cell.needs if not folders.trained(matrix.cell(name))]
        if not folders.trained(cell):
            name = f"train:{cell.name}"
            tasks.append(Task(name, [*train, *own, *_training(folders, cell)], list(waits), logs / f"{cell.name}.log"))
            waits.append(name)
        if cell is first and first.rows[0] in folders.missing(first):
            command = [*measure, first.name, "--row", first.rows[0].name]
            tasks.append(Task(REFERENCE, command, waits, logs / f"{REFERENCE}.log"))
        if folders.missing(cell):
            if first.rows[0] in folders.missing(first):
                waits = [*waits, REFERENCE]
            command = [*measure, cell.name]
            tasks.append(Task(f"{MEASURE}:{cell.name}", command, waits, logs / f"{cell.name}.rows.log"))
    return tasks


def _chosen(folders: Folders, only: Sequence[str]) -> list[Cell]:
    """Cells of which rows are missing, and what these need. Raises UsageError for a name that no cell has."""
    matrix = folders.matrix
    named = [matrix.cell(name) for name in only] or matrix.cells
    if found := [cell for cell in named if folders.missing(cell)]:
        found.append(matrix.cells[0])
    wanted: set[str] = set()
    while found:
        cell = found.pop()
        wanted.add(cell.name)
        if not cell.stage or not folders.trained(cell):
            found += [matrix.cell(name) for name in cell.needs]
    return [cell for cell in matrix.cells if cell.name in wanted]


def _training(folders: Folders, cell: Cell) -> list[str]:
    teacher = folders.checkpoint(folders.matrix.cells[0])
    data = folders.base / "data" / "checkpoint"
    return [
        f"output_dir={folders.root / 'cells'}",
        f"name={cell.name}",
        f"stages=[{cell.stage}]",
        f"model.teacher={teacher}",
        f"model.codec={folders.codec}",
        "data.kind=shards",
        f"data.path={data}",
        *cell.overrides(folders.checkpoints()),
    ]


class Queue:
    """Tasks and who may run: shared by the threads that each wait for one child process."""

    def __init__(self, tasks: Sequence[Task], deadline: float) -> None:
        self.tasks = list(tasks)
        self.deadline = deadline
        self._changed = threading.Condition()
        self._children: set[subprocess.Popen[bytes]] = set()

    def take(self) -> Task | None:
        """The most important task whose needs are met; None when nothing is left to wait for."""
        with self._changed:
            while True:
                self._skip_orphans()
                if time.monotonic() >= self.deadline or not any(task.state == "waiting" for task in self.tasks):
                    return None
                states = {task.name: task.state for task in self.tasks}
                for task in self.tasks:
                    if task.state == "waiting" and all(states.get(name, "done") == "done" for name in task.needs):
                        task.state = "running"
                        return task
                self._changed.wait(timeout=1.0)

    def _skip_orphans(self) -> None:
        states = {task.name: task.state for task in self.tasks}
        for task in self.tasks:
            if task.state == "waiting" and any(states.get(name) in ("failed", "skipped") for name in task.needs):
                task.state = "skipped"
                states[task.name] = "skipped"

    def run(self, task: Task, environment: dict[str, str]) -> None:
        """Runs the child to its end, or to the deadline. Where none can begin the task has failed: others may wait for it."""
        began = time.monotonic()
        code = None
        try:
            code = self._child(task, environment)
        except OSError as error:
            print(f"{task.name}: {error}", file=sys.stderr, flush=True)
        with self._changed:
            task.seconds = time.monotonic() - began
            late = time.monotonic() >= self.deadline
            task.state = "done" if code == 0 else "waiting" if late else "failed"
            self._changed.notify_all()

    def _child(self, task: Task, environment: dict[str, str]) -> int | None:
        """What the child ended with."""
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            child = subprocess.Popen(
                task.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
            with self._changed:
                self._children.add(child)
            try:
                child.wait(timeout=max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _end(child)
        with self._changed:
            self._children.discard(child)
        return child.returncode

    def stop(self) -> None:
        """No further task begins; running children are ended, all at the same time."""
        with self._changed:
            self.deadline = 0.0
            children = list(self._children)
            self._changed.notify_all()
        enders = [threading.Thread(target=_end, args=(child,)) for child in children]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask the child to save and go, then insist."""
    for sign, patience in ((signal.SIGTERM, LAST_WORDS), (signal.SIGKILL, 10)):
        try:
            os.killpg(child.pid, sign)
            child.wait(timeout=patience)
        except ProcessLookupError:
            child.wait()
        except subprocess.TimeoutExpired:
            continue
        return


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Children have sessions of their own: were this process just to end, they would run on, and hold their GPUs."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends a second one while children save
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_tasks(
    tasks: Sequence[Task], gpus: Sequence[str], per_gpu: int, minutes: float, say: Callable[[str], None] = print
) -> Outcome:
    """Run `tasks` until they are done, time is up, or this process is interrupted (Ctrl-C, SIGTERM): what had to stop is left.

    Args:
        gpus: names for CUDA_VISIBLE_DEVICES; [""] leaves the machine as it is (no GPU).
        per_gpu: children at once on each.
        minutes: after which children are asked to save and go; 0: no limit.
    """
    began = time.monotonic()
    queue = Queue(tasks, began + 60 * minutes if minutes else float("inf"))

    def work(gpu: str) -> None:
        environment = dict(os.environ)
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        while (task := queue.take()) is not None:
            say(f"{time.monotonic() - began:6.0f} s  {task.name} begins{f' on GPU {gpu}' if gpu else ''}")
            queue.run(task, environment)
            state = "left" if task.state == "waiting" else task.state  # ended early: the next run goes on with it
            say(f"{time.monotonic() - began:6.0f} s  {task.name}: {state} after {task.seconds:.0f} s")

    # Slot by slot over the GPUs, so that the most important tasks do not share one.
    threads = [threading.Thread(target=work, args=(gpu,), daemon=True) for _ in range(per_gpu) for gpu in gpus]
    with _interrupted_by_sigterm():
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            say("interrupted: what runs is asked to save and go")
            queue.stop()
            for thread in threads:
                thread.join()
    outcome = Outcome()
    for task in tasks:
        if task.state == "done":
            outcome.done.append(task.name)
        elif task.state == "failed":
            outcome.failed[task.name] = task.log
        else:
            outcome.left.append(task.name)
    return outcome
