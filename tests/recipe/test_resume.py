"""A run that is killed at any moment continues to the very weights of one that was not; what is done is done once."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from recipe_world import (
    RCM_STEPS,
    SLA_STEPS,
    World,
    arguments,
    command,
    environment,
    read_metrics,
    read_status,
    train_here,
    wait_for_step,
    weights,
    write_teacher,
)

import turbotrain.recipe


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def kill_at(overrides: list[str], folder: Path, step: int) -> None:
    with (folder.parent.parent / "killed.log").open("a") as log:
        process = subprocess.Popen(command(overrides), env=environment(), stdout=log, stderr=log)
        wait_for_step(folder, step)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert read_status(folder)["status"] == "running", "the kill came too late to test anything"


def test_the_uninterrupted_run_exercises_what_it_should(whole: Path) -> None:
    roles = [line["role"] for line in read_metrics(whole / "rcm")]
    assert roles == ["student", "student", "critic", "student"] * 2 or roles.count("critic") == 3
    assert any("dmd" in line for line in read_metrics(whole / "rcm"))
    assert any("scm" in line for line in read_metrics(whole / "rcm"))
    assert not (whole / "sla" / "state").exists(), "training states go when the stage is done"


@pytest.mark.slow
def test_kill_9_in_both_stages_and_rerun_gives_equal_weights(
    world: World, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = arguments(
        world, tmp_path, "data.memory_gb=0"
    )  # read from the files as needed; `whole` held it in memory
    run = tmp_path / "run"
    kill_at(overrides, run / "sla", 3)
    torn = run / "sla" / "state" / ".tmp-step_00000099-1"
    torn.mkdir()
    (torn / "student.safetensors").write_bytes(b"torn")
    kill_at(overrides, run / "rcm", 4)
    assert train_here(*overrides) == 0
    printed = capsys.readouterr().out
    assert "sla: done already" in printed
    assert "rcm: was interrupted, continuing" in printed
    for stage, steps in (("sla", SLA_STEPS), ("rcm", RCM_STEPS)):
        assert_same_weights(run / stage, whole / stage)
        lines, expected = read_metrics(run / stage), read_metrics(whole / stage)
        assert [line["step"] for line in lines] == list(range(steps))
        assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert not list(run.rglob(".tmp-*")), "what the killed processes left half-written is gone"


def test_a_kill_between_checkpoint_and_record_is_resumed(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    overrides = arguments(world, tmp_path, "stages=[sla]")
    with monkeypatch.context() as patch:
        patch.setattr(turbotrain.recipe, "finish", killed)
        assert train_here(*overrides) == 1
    stage = tmp_path / "run" / "sla"
    assert read_status(stage)["status"] == "running"
    # Also within the checkpoint of two experts, and beside the best state's.
    torn = [stage / place / ".tmp-checkpoint.torn" for place in ("", "best", "checkpoint")]
    for folder in torn:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"torn")
    assert train_here(*overrides) == 0
    assert read_status(stage)["status"] == "done"
    assert not any(folder.exists() for folder in torn)
    assert_same_weights(stage, whole / "sla")


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_what_is_done_is_skipped(
    world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert train_here(*arguments(world, tmp_path, "sla.save_every=7", "logging.log_every=3")) == 0
    printed = capsys.readouterr().out
    assert "sla: done already, skipped" in printed
    assert "rcm: done already, skipped" in printed
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


def test_a_changed_setting_makes_stale_and_keeps_the_old_result(
    world: World, finished: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*arguments(world, tmp_path, "stages=[sla]", "sla.steps=2")) == 0
    printed = capsys.readouterr().out
    assert f"sla: stale (sla.steps: {SLA_STEPS} -> 2), running again" in printed
    assert_same_weights(tmp_path / "run" / "sla.stale-1", whole / "sla")
    assert len(read_metrics(finished / "sla")) == 2
    # What was made from the old result says so too, whether it is selected or not.
    assert train_here(*arguments(world, tmp_path, "stages=[sla]", "sla.steps=2")) == 0
    assert "rcm: stale (sla changed), used as it is" in capsys.readouterr().out


def test_a_changed_input_file_makes_stale(
    world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = World(write_teacher(tmp_path / "other", seed=5), world.shards)
    assert train_here(*arguments(other, tmp_path, "stages=[rcm]", "rcm.phases=[{cm: scm, dmd: false, steps: 1}]")) == 0
    printed = capsys.readouterr().out
    assert "sla: stale (teacher changed), used as it is" in printed
    assert "rcm: stale (teacher changed; rcm.phases: " in printed


def test_a_second_process_in_the_same_folder_is_refused(
    world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    before = (finished / "config.yaml").read_text()
    with (finished / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train_here(*arguments(world, tmp_path, "sla.steps=3")) == 2
    error = capsys.readouterr().err
    assert "name='run': another process is running in" in error
    assert error.count("\n") == 1
    assert (finished / "config.yaml").read_text() == before
    assert json.loads((finished / "sla" / "stage.json").read_text())["status"] == "done"
