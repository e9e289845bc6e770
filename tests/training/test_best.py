"""keep_best: the state with the lowest mean of a metric stays, whatever interrupts the run, and becomes a checkpoint too."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_world import World, read_metrics, train_here, weights
from tiny_world import tiny_arguments, tiny_world
from torch import Tensor
from training_world import LineTask, accelerator, settings

from turbotrain.checkpoint import CheckpointMeta, read_meta
from turbotrain.compose import UsageError
from turbotrain.config import load_config
from turbotrain.stages import artifacts
from turbotrain.stages.context import StageContext
from turbotrain.training.best import Best
from turbotrain.training.interrupt import Interruption, Stopped
from turbotrain.training.loop import train
from turbotrain.training.state import best_state, saved_steps, saved_tensors

# Losses of the steps: the mean over steps 3 to 5 (the state after step 6) is the lowest.
LOSSES = (5.0, 5.0, 5.0, 1.0, 2.0, 1.0, 4.0, 0.5, 4.0, 3.0, 3.0, 3.0)


def spoil(step: int, loss: Tensor) -> Tensor:
    return LOSSES[step] + 0 * loss


def run(
    folder: Path,
    spoil: Callable[[int, Tensor], Tensor] = spoil,
    steps: int = 10,
    metric: str = "loss",
    phase: Callable[[int], str] = lambda step: "",
) -> LineTask:
    task = LineTask(spoil, phase=phase)
    how = dataclasses.replace(settings(steps=steps, save_every=3), keep_best=metric, keep_last=1)
    train(task, how, folder, accelerator())
    return task


def test_the_best_state_stays_beside_the_last(tmp_path: Path) -> None:
    run(tmp_path)
    assert saved_steps(tmp_path / "state") == [6, 10]
    best = best_state(tmp_path / "state")
    assert (best["metric"], best["step"]) == ("loss", 6)
    assert best["value"] == pytest.approx(4 / 3)
    at_six = saved_tensors(tmp_path / "state", "even/weight/", 6)
    six = LineTask(spoil)
    train(six, settings(steps=6, save_every=3), tmp_path / "six", accelerator())
    assert torch.equal(at_six["weight"], six.roles["even"].weights()["weight"])


def test_an_interrupted_run_finds_the_same_best(tmp_path: Path) -> None:
    """Killed after step 8, that is after the best was saved and within the next window."""

    class Killed(BaseException):
        pass

    def kill(step: int, loss: Tensor) -> Tensor:
        if step == 8:
            raise Killed
        return spoil(step, loss)

    with pytest.raises(Killed):
        run(tmp_path, kill)
    assert saved_steps(tmp_path / "state") == [6]
    run(tmp_path)
    assert saved_steps(tmp_path / "state") == [6, 10]
    assert best_state(tmp_path / "state")["step"] == 6


def test_a_best_whose_state_is_gone_is_forgotten(tmp_path: Path) -> None:
    run(tmp_path, steps=9)
    assert saved_steps(tmp_path / "state") == [6, 9]
    shutil.rmtree(tmp_path / "state" / "step_00000006")
    run(tmp_path, steps=12)
    assert best_state(tmp_path / "state")["step"] == 12, "the only one that is left to compare"
    assert saved_steps(tmp_path / "state") == [12]


def test_another_metric_begins_anew_and_none_keeps_none(tmp_path: Path) -> None:
    run(tmp_path, steps=9)
    run(tmp_path, metric="step_twice", steps=12)
    assert best_state(tmp_path / "state")["metric"] == "step_twice"
    run(tmp_path / "none", metric="")
    assert best_state(tmp_path / "none" / "state") == {}
    assert saved_steps(tmp_path / "none" / "state") == [10]


def test_phases_of_other_losses_are_not_compared(tmp_path: Path) -> None:
    """The second phase begins at step 5, within a window, and its losses are larger."""
    run(tmp_path, phase=lambda step: "dcm" if step < 5 else "scm")
    assert best_state(tmp_path / "state")["step"] == 9
    assert saved_steps(tmp_path / "state") == [9, 10], "the best of the phase before is given up"
    run(tmp_path / "late", phase=lambda step: "dcm" if step < 8 else "scm")
    assert best_state(tmp_path / "late" / "state") == {}, "no window lies within the last phase"


def test_a_state_that_a_signal_asks_for_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved after step 8, when the means since step 6 are the lowest; the window goes on, also in the process that continues."""

    def dip(step: int, loss: Tensor) -> Tensor:
        return {6: 0.5, 7: 0.1}.get(step, LOSSES[step]) + 0 * loss

    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "asks_to_save", lambda self: next(asked) == 8)
        run(tmp_path / "saved", dip)
    assert best_state(tmp_path / "saved" / "state")["step"] == 6, "1.33; steps 6 and 7 have 0.3, with step 8 1.53"
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "asks_to_stop", lambda self: next(asked) == 8)
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", dip)
    assert best_state(tmp_path / "stopped" / "state")["step"] == 6
    run(tmp_path / "stopped", dip)
    assert best_state(tmp_path / "stopped" / "state") == best_state(tmp_path / "saved" / "state")


def test_windows_of_another_length_begin_anew() -> None:
    best = Best("loss", 2)
    for step in range(4):
        best.see(step, "", {"loss": 1.0})
    best.judge(4)
    assert best.found()["step"] == 4
    again = Best("loss", 3)
    again.load(best.state(), [4], 4)
    again.see(4, "", {"loss": 9.0})
    again.see(5, "", {"loss": 9.0})
    again.judge(6)
    assert again.found() == {}, "two steps of three"


def test_what_is_not_finite_or_of_another_role_does_not_count() -> None:
    best = Best("scm", 4)
    for step, value in enumerate((3.0, float("nan"), 1.0)):
        best.see(step, "", {"scm": value, "loss": 0.0})
    best.see(3, "", {"critic": 0.0})
    best.judge(4)
    assert best.found() == {"metric": "scm", "step": 4, "value": 2.0}
    best.judge(8)
    assert best.found()["step"] == 4, "a window without the metric is not the best"


def test_a_damaged_best_is_reported_and_the_stage_ends_with_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world: World = tiny_world(tmp_path / "world")
    write, damaged = artifacts.write_model, []

    def damage_best(context: StageContext, *args: Any, **more: Any) -> CheckpointMeta:
        """After the last state was read and before the best is."""
        best, _ = sorted((context.folder / "state").glob("step_*"))
        for file in best.glob("rank_*"):
            file.write_bytes(file.read_bytes()[:100])
            damaged.append(best.name)
        return write(context, *args, **more)

    monkeypatch.setattr(artifacts, "write_model", damage_best)
    more = ["stages=[sla]", "sla.steps=6", "sla.save_every=1", "launch.keep_best=loss", "launch.keep_last=1"]
    assert train_here(*tiny_arguments(world, tmp_path, *more, "sla.optim.lr=0.02")) == 0
    (name,) = damaged
    said = capsys.readouterr().out
    assert f"{name}: damaged" in said
    assert "only the last one becomes a checkpoint" in said
    assert weights(tmp_path / "run" / "sla")
    assert not (tmp_path / "run" / "sla" / "best").exists()


def test_the_best_becomes_a_checkpoint_beside_the_last(tmp_path: Path) -> None:
    world: World = tiny_world(tmp_path / "world")
    more = ["stages=[sla]", "sla.steps=6", "sla.save_every=1", "launch.keep_best=loss", "launch.keep_last=1"]
    assert train_here(*tiny_arguments(world, tmp_path, *more, "sla.optim.lr=0.02")) == 0
    stage = tmp_path / "run" / "sla"
    losses = [line["loss"] for line in read_metrics(stage)]
    step = losses.index(min(losses)) + 1
    assert step < 6, "losses that fall to the end would test nothing"
    said = read_meta(stage / "best" / "checkpoint").lineage[-1]["best"]
    assert (said["metric"], said["step"], said["value"]) == ("loss", step, min(losses))
    best, last = weights(stage / "best"), weights(stage)
    assert any(not torch.equal(best[name], last[name]) for name in last)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(UsageError, match=r"launch.keep_best='lss': choose one of , loss, grad_norm"):
        load_config(["recipe=shapes", "launch.keep_best=lss"])
    with pytest.raises(UsageError, match=r"launch.keep_best='loss': in rcm this is the student's .* score_gap"):
        load_config(["recipe=shapes", "launch.keep_best=loss"])
