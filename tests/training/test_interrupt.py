"""Signals, the walltime, guards and roll-backs: what makes a loop save, stop, skip or go back."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_world import LineTask, accelerator, settings, state

from turbotrain.config import GuardSection
from turbotrain.training.interrupt import Stopped
from turbotrain.training.loop import TrainingDiverged, train
from turbotrain.training.state import saved_steps


def spoil_at(moment: int, number: int):  # type: ignore[no-untyped-def]
    """A loss function that sends this process a signal during one step."""

    def spoil(step: int, loss: Tensor) -> Tensor:
        if step == moment:
            os.kill(os.getpid(), number)
        return loss

    return spoil


def assert_ends_as_undisturbed(folder: Path, tmp_path: Path) -> None:
    again, whole = LineTask(), LineTask()
    train(again, settings(), folder, accelerator())
    train(whole, settings(), tmp_path / "whole", accelerator())
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(again).items())


def test_sigterm_saves_and_stops(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="line: stopped after step 5, as asked; the same command continues"):
        train(LineTask(spoil_at(4, signal.SIGTERM)), settings(save_every=100), tmp_path / "run", accelerator())
    assert signal.getsignal(signal.SIGTERM) is before
    assert saved_steps(tmp_path / "run" / "state") == [5]
    assert_ends_as_undisturbed(tmp_path / "run", tmp_path)


def test_sigusr1_saves_and_goes_on(tmp_path: Path) -> None:
    train(LineTask(spoil_at(4, signal.SIGUSR1)), settings(save_every=100), tmp_path / "run", accelerator())
    assert saved_steps(tmp_path / "run" / "state") == [5, 10]


def test_sigusr1_in_a_bad_step_saves_after_the_next_good_one(tmp_path: Path) -> None:
    def spoil(step: int, loss: Tensor) -> Tensor:
        return spoil_at(4, signal.SIGUSR1)(step, loss) * (float("nan") if step in (4, 5) else 1)

    train(LineTask(spoil), settings(save_every=100), tmp_path / "run", accelerator())
    assert saved_steps(tmp_path / "run" / "state") == [7, 10]


def test_sigterm_in_the_last_step_reaches_who_handled_it_before(tmp_path: Path) -> None:
    """The loop has nothing left to stop; the stage after it would run on as if nobody had asked."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        train(LineTask(spoil_at(9, signal.SIGTERM)), settings(), tmp_path / "run", accelerator())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert saved_steps(tmp_path / "run" / "state")[-1] == 10


def test_the_walltime_saves_and_stops(tmp_path: Path) -> None:
    """This process is older than a thousandth of a minute: every launch stops after one step, and yet they arrive."""
    for launch in range(1, 10):
        with pytest.raises(Stopped, match=f"after step {launch},"):
            train(LineTask(), settings(walltime_minutes=1e-3), tmp_path / "run", accelerator())
    train(LineTask(), settings(walltime_minutes=1e-3), tmp_path / "run", accelerator())
    assert_ends_as_undisturbed(tmp_path / "run", tmp_path)


# ---- guards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max_loss", "max_grad_norm"])
def test_a_leap_is_not_taken(limit: str, tmp_path: Path) -> None:
    """A loss a thousand times as large, whose gradient is as well, after enough steps to know what is usual."""
    guard = GuardSection(**{limit: 50.0})
    task = LineTask(lambda step, loss: loss * 1000 if step == 50 else loss)
    train(task, settings(steps=52, guard=guard), tmp_path / "run", accelerator())
    assert [task.roles[name].updates for name in ("even", "odd")] == [25, 26]
    unguarded = LineTask(lambda step, loss: loss * 1000 if step == 50 else loss)
    train(unguarded, settings(steps=52), tmp_path / "unguarded", accelerator())
    assert unguarded.roles["even"].updates == 26


def test_the_guard_remembers_across_an_interruption(tmp_path: Path) -> None:
    """The leap comes right after a resume: without its history the guard would let it pass."""
    guard = GuardSection(max_loss=50.0)
    train(LineTask(), settings(steps=50, guard=guard), tmp_path, accelerator())
    task = LineTask(lambda step, loss: loss * 1000)
    train(task, settings(steps=52, guard=guard), tmp_path, accelerator())
    assert [task.roles[name].updates for name in ("even", "odd")] == [25, 25]


def test_a_rollback_takes_other_data_from_the_last_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data that no longer come are what spoilt the loss: after the roll-back training arrives."""
    nan = float("nan")
    task = LineTask()
    task.spoil = lambda step, loss: loss * nan if task.draws[-1] in (7, 8, 9) else loss
    train(task, settings(steps=12, save_every=5, guard=GuardSection(rollbacks=1)), tmp_path, accelerator())
    assert task.draws == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, *range(5 + 12, 12 + 12)]
    assert sum(role.updates for role in task.roles.values()) == 12
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(12))
    assert "back to the state after step 5, with other data" in capsys.readouterr().out


def test_training_stops_when_rollbacks_are_used_up(tmp_path: Path) -> None:
    task = LineTask(lambda step, loss: loss * float("nan") if step >= 6 else loss)
    with pytest.raises(TrainingDiverged, match="the state after step 6 is kept"):
        train(task, settings(guard=GuardSection(rollbacks=2)), tmp_path, accelerator())
    assert len(task.draws) == 9 + 3 + 3


def test_a_profile_is_written_when_asked_for(tmp_path: Path) -> None:
    train(LineTask(), settings(profile_steps=(2, 4)), tmp_path, accelerator())
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) >= 2
    assert any("addmm" in name for name in names)
