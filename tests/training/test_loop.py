"""The loop: it resumes exactly, skips a step that is not finite, and stops when nothing else comes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_world import LineTask, accelerator, settings, state

from turbotrain.training.loop import TrainingDiverged, train
from turbotrain.training.pieces import Piece
from turbotrain.training.state import read_state, saved_steps

NAN = float("nan")


def every_piece(task: LineTask) -> list[Piece]:
    return [piece for role in task.roles.values() for piece in role.pieces()]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(1, 10))
def test_interrupted_anywhere_it_ends_with_equal_weights(moment: int, tmp_path: Path) -> None:
    whole = LineTask()
    train(whole, settings(), tmp_path / "whole", accelerator())

    def killed(step: int, loss: Tensor) -> Tensor:
        if step == moment:
            raise Killed
        return loss

    with pytest.raises(Killed):
        train(LineTask(killed), settings(), tmp_path / "killed", accelerator())
    again = LineTask()
    train(again, settings(), tmp_path / "killed", accelerator())
    expected = state(whole)
    assert all(torch.equal(value, expected[name]) for name, value in state(again).items())
    assert [role.updates for role in again.roles.values()] == [5, 5]
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(10))
    assert [line["loss"] for line in metrics(tmp_path / "killed")] == [
        line["loss"] for line in metrics(tmp_path / "whole")
    ]


def test_old_states_are_dropped(tmp_path: Path) -> None:
    train(LineTask(), settings(), tmp_path, accelerator())
    assert saved_steps(tmp_path / "state") == [9, 10]


def test_one_bad_step_is_skipped_and_counted(tmp_path: Path) -> None:
    task = LineTask(lambda step, loss: loss * NAN if step == 4 else loss)
    train(task, settings(), tmp_path, accelerator())
    assert task.roles["even"].updates == 4
    assert task.roles["odd"].updates == 5
    assert all(torch.isfinite(value).all() for value in state(task).values())
    assert [line["step"] for line in metrics(tmp_path) if math.isnan(line["loss"])] == [4]


def test_a_nan_loss_with_finite_gradients_is_bad_too(tmp_path: Path) -> None:
    task = LineTask(lambda step, loss: loss + NAN if step == 4 else loss)
    train(task, settings(), tmp_path, accelerator())
    assert task.roles["even"].updates == 4


@pytest.mark.parametrize("first_bad", [0, 4, 6])
def test_divergence_stops_and_keeps_the_last_good_state(first_bad: int, tmp_path: Path) -> None:
    good = LineTask()
    if first_bad:
        train(good, settings(steps=first_bad), tmp_path / "good", accelerator())
    task = LineTask(lambda step, loss: loss * NAN if step >= first_bad else loss)
    with pytest.raises(TrainingDiverged, match=rf"line: 3 steps in a row.*the state after step {first_bad}.*rerun"):
        train(task, settings(), tmp_path / "bad", accelerator())
    assert len(metrics(tmp_path / "bad")) == first_bad + 3
    restored = LineTask()
    found = read_state(tmp_path / "bad" / "state", every_piece(restored))
    assert (found["step"] if found else 0) == first_bad
    expected = state(good)
    assert all(torch.equal(value, expected[name]) for name, value in state(restored).items())
    # With the cause gone, the same command goes on and ends where an undisturbed run does.
    train(restored, settings(), tmp_path / "bad", accelerator())
    whole = LineTask()
    train(whole, settings(), tmp_path / "whole", accelerator())
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(restored).items())


def test_bad_steps_that_are_not_in_a_row_do_not_stop(tmp_path: Path) -> None:
    task = LineTask(lambda step, loss: loss * NAN if step % 3 else loss)
    train(task, settings(), tmp_path, accelerator())
    assert sum(role.updates for role in task.roles.values()) == 4


def test_samples_come_when_asked(tmp_path: Path) -> None:
    seen: list[int] = []
    train(LineTask(), settings(sample_every=4), tmp_path, accelerator(), seen.append)
    assert seen == [4, 8]
