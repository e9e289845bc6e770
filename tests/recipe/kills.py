"""Two-process runs that are killed with SIGKILL, one process or both, at a random moment or while a state is being written."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import torch.multiprocessing as mp
from recipe_world import read_metrics, start_on

import turbotrain.training.state as state_module
from turbotrain.training.pieces import write_pieces

SLOW_S = 0.3


def slow_write(path: Path, pieces: object) -> None:
    """Half of the file is there for a while before the rest: what a kill then leaves is torn for certain."""
    write_pieces(path, pieces)  # type: ignore[arg-type]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    time.sleep(SLOW_S)
    path.write_bytes(whole)


def run_and_kill(overrides: list[str], run: Path, seed: int) -> str:
    """Continue a run until a moment that `seed` chooses, and kill there; says what was done ("finished" if it came too late)."""
    choose = random.Random(seed)
    writing, everybody = choose.random() < 0.5, choose.random() < 0.5
    more_steps = choose.randint(1, 3)
    real = state_module.write_pieces
    if writing:
        state_module.write_pieces = slow_write
    began = _lines(run)
    context = start_on(2, *overrides)
    try:
        while not _time_has_come(run, began + more_steps, writing):
            if not all(process.is_alive() for process in context.processes):
                break
            time.sleep(0.002)
        time.sleep(choose.uniform(0, SLOW_S / 2))
        late = not all(process.is_alive() for process in context.processes)
        _kill(context, range(2) if everybody else [choose.randrange(2)])
    finally:
        state_module.write_pieces = real
    return "finished" if late else f"killed {'both' if everybody else 'one'}{' while writing' if writing else ''}"


def _lines(run: Path) -> int:
    return sum(len(read_metrics(run / stage)) for stage in ("sla", "rcm"))


def _time_has_come(run: Path, lines: int, writing: bool) -> bool:
    return _lines(run) >= lines and (not writing or any(run.glob("*/state/.tmp-step_*")))


def _kill(context: mp.ProcessContext, ranks: object) -> None:
    """The chosen ranks; then the rest, as a launcher does when one is gone."""
    for rank in ranks:  # type: ignore[attr-defined]
        os.kill(context.processes[rank].pid, signal.SIGKILL)
    deadline = time.monotonic() + 1.0
    for process in context.processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
        process.join()
