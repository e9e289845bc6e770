"""The queue: order, dependencies, failures, time limits, and going on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from turbotrain.compose import UsageError
from turbotrain.evidence import schedule
from turbotrain.evidence.folders import Folders
from turbotrain.evidence.matrix import load_matrix
from turbotrain.evidence.schedule import Outcome, Task, plan, run_tasks
from turbotrain.records import write_json


def _task(folder: Path, name: str, code: str, *needs: str) -> Task:
    note = f"open({str(folder / 'order')!r}, 'a').write({name!r} + ' ');"
    return Task(name, [sys.executable, "-c", note + code], list(needs), folder / "logs" / f"{name}.log")


def test_tasks_run_in_order_after_what_they_need_and_failures_take_only_dependants_along(tmp_path: Path) -> None:
    tasks = [
        _task(tmp_path, "last", "", "first"),
        _task(tmp_path, "first", ""),
        _task(tmp_path, "broken", "print('why'); raise SystemExit(3)"),
        _task(tmp_path, "orphan", "", "broken"),
        _task(tmp_path, "free", ""),
    ]
    outcome = run_tasks(tasks, [""], 1, 0, lambda line: None)
    # `first` makes room for what is more important than all others.
    assert (tmp_path / "order").read_text().split() == ["first", "last", "broken", "free"]
    assert outcome.done == ["last", "first", "free"]
    assert list(outcome.failed) == ["broken"]
    assert outcome.failed["broken"].read_text() == "why\n"
    assert outcome.left == ["orphan"]


def test_a_child_that_cannot_begin_keeps_nobody_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = Task("absent", [str(tmp_path / "no-such-program")], [], tmp_path / "logs" / "absent.log")
    tasks = [absent, _task(tmp_path, "orphan", "", "absent"), _task(tmp_path, "free", "")]
    outcome = run_tasks(tasks, [""], 1, 20 / 60, lambda line: None)
    assert (outcome.done, list(outcome.failed), outcome.left) == (["free"], ["absent"], ["orphan"])
    assert "no-such-program" in capsys.readouterr().err


def test_several_run_at_once_and_each_sees_its_gpu(tmp_path: Path) -> None:
    meet = (
        "import os, time, pathlib; me = os.environ['CUDA_VISIBLE_DEVICES'];"
        f"folder = pathlib.Path({str(tmp_path)!r}); (folder / ('gpu' + me)).touch();"
        "end = time.time() + 20\n"
        "while len(list(folder.glob('gpu*'))) < 2: assert time.time() < end; time.sleep(0.01)"
    )
    outcome = run_tasks([_task(tmp_path, "a", meet), _task(tmp_path, "b", meet)], ["0", "1"], 1, 0, lambda line: None)
    assert outcome.done == ["a", "b"]


def test_time_ends_children_who_may_save_first(tmp_path: Path) -> None:
    saving = (
        "import signal, sys, time, pathlib\n"
        f"def save(*_): pathlib.Path({str(tmp_path / 'saved')!r}).touch(); sys.exit(1)\n"
        f"signal.signal(signal.SIGTERM, save); pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    )
    began = time.monotonic()
    tasks = [_task(tmp_path, "long", saving), _task(tmp_path, "later", "")]
    outcome = run_tasks(tasks, [""], 1, 2 / 60, lambda line: None)
    assert time.monotonic() - began < 20
    assert outcome.left == ["long", "later"]
    assert not outcome.failed
    assert (tmp_path / "saved").exists()


def test_an_interruption_ends_children_who_may_save_first(tmp_path: Path) -> None:
    """They have sessions of their own, which no signal to this process reaches."""
    saving = (
        "import signal, sys, time, pathlib\n"
        f"folder = pathlib.Path({str(tmp_path)!r}); me = sys.argv[1]\n"
        "def save(*_): time.sleep(0.3); (folder / ('saved' + me)).touch(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save); (folder / ('ready' + me)).touch(); time.sleep(60)"
    )
    tasks = [_task(tmp_path, name, saving) for name in ("a", "b", "later")]
    for task in tasks:
        task.command.append(task.name)
    began = time.monotonic()

    def interrupt() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < began + 30:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt, daemon=True).start()
    outcome = run_tasks(tasks, [""], 2, 0, lambda line: None)
    assert time.monotonic() - began < 20
    assert (outcome.left, outcome.failed) == (["a", "b", "later"], {})
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saveda", "savedb"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_plan_holds_what_is_missing_and_nothing_else(matrix_file: Path, tmp_path: Path) -> None:
    matrix = load_matrix(matrix_file)
    folders = Folders(tmp_path / "run", matrix)
    folders.root.mkdir()
    write_json(folders.root / "given.json", {"teacher": "/t", "codec": "/c"})
    tasks = {task.name: task for task in plan(folders, ["train"], ["measure"], ["seed=3"])}
    assert list(tasks) == [
        "base", "reference", "measure:teacher", "train:sla010", "measure:sla010", "train:turbo", "measure:turbo", "measure:copy"
    ]  # fmt: skip
    assert tasks["base"].command[-3:] == ["name=base", "stages=[data]", "model.codec=/c"]
    assert tasks["train:turbo"].needs == ["base", "train:sla010"]
    assert tasks["measure:copy"].needs == ["base", "train:turbo", "reference"]
    command = tasks["train:turbo"].command
    assert f"model.sla={folders.root}/cells/sla010/sla/checkpoint" in command
    assert {"seed=3", "model.teacher=/t", "stages=[rcm]", f"data.path={folders.base}/data/checkpoint"} <= set(command)
    for stage in (folders.base / "data", folders.root / "cells" / "sla010" / "sla"):
        stage.mkdir(parents=True)
        write_json(stage / "stage.json", {"status": "done"})
    for cell in matrix.cells[:2]:
        folders.result(cell, cell.rows[0]).parent.mkdir(parents=True)
        folders.result(cell, cell.rows[0]).write_text("{}")
    tasks = {task.name: task for task in plan(folders, ["train"], ["measure"], [])}
    assert list(tasks) == ["train:turbo", "measure:turbo", "measure:copy"]
    assert tasks["train:turbo"].needs == []


def test_nothing_is_trained_for_rows_that_are_all_there(matrix_file: Path, tmp_path: Path) -> None:
    matrix = load_matrix(matrix_file)
    folders = Folders(tmp_path / "run", matrix)
    folders.root.mkdir()
    write_json(folders.root / "given.json", {"teacher": "/t", "codec": "/c"})

    def tasks() -> list[str]:
        return [task.name for task in plan(folders, [], [], []) if task.name != "base"]

    for cell in matrix.cells:
        for row in cell.rows:
            folders.result(cell, row).parent.mkdir(parents=True, exist_ok=True)
            folders.result(cell, row).write_text("{}")
    assert plan(folders, [], [], []) == []
    (folders.root / "results" / "copy" / "s1.json").unlink()
    assert tasks() == ["train:sla010", "train:turbo", "measure:copy"]
    turbo = folders.root / "cells" / "turbo" / "rcm"
    turbo.mkdir(parents=True)
    write_json(turbo / "stage.json", {"status": "done"})
    assert tasks() == ["measure:copy"]


def test_chosen_cells_bring_what_they_need_and_the_reference(matrix_file: Path, tmp_path: Path) -> None:
    folders = Folders(tmp_path / "run", load_matrix(matrix_file))
    folders.root.mkdir()
    with pytest.raises(UsageError, match="--teacher: missing"):
        plan(folders, [], [], [], ["copy"])
    write_json(folders.root / "given.json", {"teacher": "/t", "codec": "/c"})
    names = [task.name for task in plan(folders, [], [], [], ["copy"])]
    assert names == [
        "base", "reference", "measure:teacher", "train:sla010", "measure:sla010", "train:turbo", "measure:turbo", "measure:copy"
    ]  # fmt: skip
    assert [task.name for task in plan(folders, [], [], [], ["teacher"])] == ["base", "reference", "measure:teacher"]
    with pytest.raises(UsageError, match="nobody"):
        plan(folders, [], [], [], ["nobody"])


def test_the_tool_is_done_when_what_was_asked_for_is_there(
    tool: ModuleType, matrix_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell of several is all that `--only` asks for."""
    asked = ["run", str(matrix_file), "-o", str(tmp_path / "run"), "--only", "teacher"]
    asked += ["--teacher", str(tmp_path), "--codec", str(tmp_path)]
    for outcome, status in (
        (Outcome(done=["measure:teacher"]), 0),
        (Outcome(left=["measure:teacher"]), 1),
        (Outcome(failed={"measure:teacher": tmp_path / "log"}), 1),
    ):
        monkeypatch.setattr(schedule, "run_tasks", lambda *_, outcome=outcome: outcome)
        assert tool.main(asked) == status


def test_what_cannot_be_run_is_a_usage_error(
    tool: ModuleType, matrix_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", str(matrix_file), "-o", str(tmp_path / "run")]
    assert tool.main([*asked, "--teacher", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("usage: --teacher ")


def test_a_fresh_run_does_not_write_over_the_rows_of_another(
    tool: ModuleType,
    matrix_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not one row is measured when it begins, and an interruption writes what is there."""
    monkeypatch.setattr(schedule, "run_tasks", lambda *_: Outcome())
    root, kept = tmp_path / "run", tmp_path / "kept.json"
    asked = ["run", str(matrix_file), "-o", str(root), "--json", str(kept)]
    asked += ["--teacher", str(tmp_path), "--codec", str(tmp_path)]
    for text, words in (
        ('{"rows": [{"cell": "teacher", "row": "s4"}]}', "holds 1 rows, teacher/s4 first, that are not in"),
        ("{}", "holds no results of a matrix"),
    ):
        kept.write_text(text)
        assert tool.main(asked) == 2
        assert f"--json {kept}: " in (said := capsys.readouterr().err)
        assert words in said
        assert kept.read_text() == text
    kept.write_text('{"rows": []}')  # an interrupted run's, for one
    assert tool.main(asked) == 0
    assert '"planned_rows"' in kept.read_text()


@pytest.mark.parametrize(
    ("gpus", "known"),
    [("0,1", True), ("GPU-8f0e,MIG-1/2/0", True), ("x", False), ("0,", False), ("0,,1", False), ("0 1", False)],
)
def test_gpus_that_cuda_would_overlook_are_refused(
    tool: ModuleType, gpus: str, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an unknown name CUDA shows no GPU, and every training would go to the CPU."""
    if known:
        assert tool.parse(["run", "matrix.yaml", "--gpus", gpus]).gpus == gpus
        return
    with pytest.raises(SystemExit) as left:
        tool.parse(["run", "matrix.yaml", "--gpus", gpus])
    assert left.value.code == 2
    assert f"--gpus {gpus}: " in capsys.readouterr().err


def test_what_came_of_other_settings_is_not_gone_on_with(matrix_file: Path, tmp_path: Path) -> None:
    folders = Folders(tmp_path / "run", load_matrix(matrix_file))
    folders.root.mkdir()

    def changed(old: str, new: str, overrides: list[str]) -> Folders:
        text = matrix_file.read_text()
        assert old in text
        other = tmp_path / "other" / matrix_file.name
        other.parent.mkdir(exist_ok=True)
        other.write_text(text.replace(old, new, 1))
        found = Folders(folders.root, load_matrix(other))
        found.declare(overrides)
        return found

    folders.declare(["seed=3"])
    changed("attention.topk=0.1", "attention.topk=0.3", ["seed=4"])  # nothing is there yet
    folders.declare(["seed=3"])
    (folders.root / "cells" / "sla010").mkdir(parents=True)
    turbo = folders.matrix.cell("turbo")
    folders.result(turbo, turbo.rows[0]).parent.mkdir(parents=True)
    folders.result(turbo, turbo.rows[0]).write_text("{}")
    folders.declare(["seed=3", "logging.interval=5"])
    changed("title: Turbo", "title: Fast", ["seed=3"])  # what it is called may change,
    changed("int8_4: {steps: 4", "int8_4: {steps: 2", ["seed=3"])  # and what has not been measured
    changed("  copy:", "  more: {group: turbo, network: teacher, rows: {s1: {steps: 1}}}\n  copy:", ["seed=3"])
    for old, new, overrides, words in (
        ("attention.topk=0.1", "attention.topk=0.3", ["seed=3"], r"cells.sla010.train=.*0.3.* came of .*0.1"),
        (
            "s1: {steps: 1}\n      int8",
            "s1: {steps: 2}\n      int8",
            ["seed=3"],
            "cells.turbo.rows.s1.steps=2: .* came of 1",
        ),
        ("prompts: 2", "prompts: 3", ["seed=3"], "matrix.prompts=3: .* came of 2; give another --output"),
        ("prompts: 2", "prompts: 2", ["seed=4"], r"matrix.overrides=\['seed=4'\]"),
    ):
        with pytest.raises(UsageError, match=words):
            changed(old, new, overrides)
