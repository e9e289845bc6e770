"""Training states: all or nothing on disk, exact when read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_world import LineTask, accelerator, line_role, settings

import turbotrain.training.state as state_module
from turbotrain.config import OptimSection
from turbotrain.training.log import truncate_metrics
from turbotrain.training.loop import train
from turbotrain.training.optim import make_optimizer
from turbotrain.training.parallel import Role
from turbotrain.training.state import load_state, save_state, saved_steps

CPU = torch.device("cpu")


def trained() -> dict[str, Role]:
    role = line_role()
    role.network(torch.ones(1, 3)).sum().backward()
    role.optimizer.step()
    role.updates = 1
    return {"line": role}


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    before = trained()
    save_state(tmp_path, 12, before, {"average": torch.arange(3)}, keep=2)
    after = {"line": line_role()}
    step, extra = load_state(tmp_path, after, CPU)
    assert step == 12
    assert torch.equal(extra["average"], torch.arange(3))
    assert after["line"].updates == 1
    for (_, ours), (_, theirs) in zip(after["line"].named_parameters(), before["line"].named_parameters(), strict=True):
        assert torch.equal(ours, theirs)
        mine, other = after["line"].optimizer.state[ours], before["line"].optimizer.state[theirs]
        assert mine.keys() == other.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_no_state_starts_at_zero(tmp_path: Path) -> None:
    assert load_state(tmp_path / "nothing", {"line": line_role()}, CPU) == (0, {})


def test_torn_folders_are_ignored_and_cleared(tmp_path: Path) -> None:
    roles = trained()
    save_state(tmp_path, 1, roles, {}, keep=2)
    (tmp_path / ".tmp-step_00000002-123").mkdir()
    (tmp_path / ".tmp-step_00000002-123" / "line.safetensors").write_bytes(b"torn")
    assert load_state(tmp_path, {"line": line_role()}, CPU)[0] == 1
    save_state(tmp_path, 2, roles, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 15):
        save_state(tmp_path, step, trained(), {}, keep=2)
    assert saved_steps(tmp_path) == [15, 100]


def test_a_failed_write_leaves_the_states_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = trained()
    save_state(tmp_path, 1, roles, {}, keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_module, "_sync", full)
    with pytest.raises(OSError, match=r"step_00000002: .*No space left on device.*free some space"):
        save_state(tmp_path, 2, roles, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 1, trained(), {}, keep=1)
    other = line_role()
    other.network = torch.nn.Linear(5, 2)
    other.optimizer = make_optimizer(other.network.parameters(), OptimSection())
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_state(tmp_path, {"line": other}, CPU)


def test_metrics_are_cut_where_the_run_continues(tmp_path: Path) -> None:
    train(LineTask(), settings(), tmp_path, accelerator())
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + whole[0][:20])  # torn by a kill
    truncate_metrics(path, 6)
    assert path.read_text().splitlines(keepends=True) == whole[:6]
    truncate_metrics(tmp_path / "absent.jsonl", 6)
    assert not (tmp_path / "absent.jsonl").exists()
