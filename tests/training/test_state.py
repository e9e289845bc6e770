"""Training states: all or nothing on disk, exact when read again."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_world import LineTask, accelerator, line_role, settings

import turbotrain.training.state as state_module
from turbotrain.config import OptimSection
from turbotrain.training.log import truncate_metrics
from turbotrain.training.loop import train
from turbotrain.training.optim import make_optimizer
from turbotrain.training.pieces import Piece, SavedPieces, write_pieces
from turbotrain.training.roles import Role
from turbotrain.training.state import STATE_FILE, StateWriter, newest_state, read_state, saved_steps, saved_tensors


def trained() -> Role:
    role = line_role()
    role.network(torch.ones(1, 3)).sum().backward()
    role.optimizer.step()
    return role


def save(folder: Path, step: int, pieces: list[Piece] | None = None, keep: int = 2) -> None:
    writer = StateWriter(folder, keep)
    writer.save(step, trained().pieces() if pieces is None else pieces, {"note": "kept"})
    writer.wait()


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    before, after = trained(), line_role()
    save(tmp_path, 12, before.pieces())
    found = read_state(tmp_path, after.pieces())
    assert found is not None
    assert (found["step"], found["note"]) == (12, "kept")
    ours, theirs = ({piece.name: piece.tensor for piece in role.pieces()} for role in (after, before))
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[1] for name in ours} == {"weight", "step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all((ours[name] != 0).any() for name in ours)
    # What was filled is what trains: the next update is the same.
    for role in (before, after):
        role.optimizer.zero_grad()
        role.network(torch.ones(1, 3)).square().sum().backward()
        role.optimizer.step()
    assert torch.equal(before.network.weight, after.network.weight)  # type: ignore[arg-type]


def test_no_state_starts_at_zero(tmp_path: Path) -> None:
    assert read_state(tmp_path / "nothing", line_role().pieces()) is None


def test_runs_of_elements_come_together_however_they_were_cut(tmp_path: Path) -> None:
    """Three processes saved; one, two and five read, with cuts at other places."""
    whole = torch.arange(35, dtype=torch.float32)
    cuts = [0, 11, 12, 35]
    files = []
    for rank, (low, high) in enumerate(itertools.pairwise(cuts)):
        files.append(tmp_path / f"rank_{rank}.safetensors")
        write_pieces(files[-1], [Piece("w", whole[low:high], (5, 7), low, replicated=False)])
    for readers in (1, 2, 5):
        parts = torch.full((35,), -1.0).tensor_split(readers)
        starts = [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
        with SavedPieces(files) as saved:
            for part, start in zip(parts, starts):
                saved.fill([Piece("w", part, (5, 7), start)])
            assert torch.equal(torch.cat(parts), whole)
            assert torch.equal(saved.whole("")["w"], whole.view(5, 7))


def test_a_hole_between_files_is_refused(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    for rank, (low, high) in enumerate(((0, 4), (5, 10))):
        write_pieces(tmp_path / f"{rank}", [Piece("w", whole[low:high], (10,), low)])
    with SavedPieces([tmp_path / "0", tmp_path / "1"]) as saved:
        saved.fill([Piece("w", torch.zeros(5), (10,), 5)])
        with pytest.raises(ValueError, match="w is incomplete, elements from 4 "):
            saved.fill([Piece("w", torch.zeros(10), (10,))])


def test_torn_folders_are_ignored_and_cleared(tmp_path: Path) -> None:
    save(tmp_path, 1)
    torn = tmp_path / ".tmp-step_00000002-123"
    torn.mkdir()
    (torn / "rank_00000.safetensors").write_bytes(b"torn")
    (torn / "done_00000").touch()
    assert saved_steps(tmp_path) == [1]
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 15):
        save(tmp_path, step)
    assert saved_steps(tmp_path) == [15, 100]


@pytest.mark.parametrize("damage", ["short", "missing", "json"])
def test_a_damaged_state_is_passed_over(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rename can reach the disk before the bytes do, where power fails."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = tmp_path / "step_00000002" / ("rank_00000.safetensors" if damage != "json" else STATE_FILE)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])
    assert newest_state(tmp_path) == tmp_path / "step_00000001"
    assert "step_00000002: damaged, passed over" in capsys.readouterr().out


def test_a_damaged_state_takes_no_good_ones_place(tmp_path: Path) -> None:
    """A run that went back behind it saves before it gets there again."""
    for step in (5, 10):
        save(tmp_path, step)
    (tmp_path / "step_00000010" / STATE_FILE).write_text("{")
    save(tmp_path, 7, keep=1)
    assert newest_state(tmp_path) == tmp_path / "step_00000007"
    assert saved_steps(tmp_path) == [7]


def test_a_failed_write_leaves_the_states_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_module, "sync", full)
    with pytest.raises(OSError, match=r"step_00000002: .*No space left on device.*free some space"):
        save(tmp_path, 2, keep=1)
    assert saved_steps(tmp_path) == [1]
    monkeypatch.undo()
    save(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_training_goes_on_while_a_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what the weights were when it was asked for, not what they are by then."""
    role, gate = trained(), threading.Event()
    write = state_module.write_pieces

    def slow(*args: object) -> None:
        assert gate.wait(20)
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(state_module, "write_pieces", slow)
    writer = StateWriter(tmp_path, 2)
    then = role.network.weight.detach().clone()  # type: ignore[union-attr, operator]
    writer.save(1, role.pieces(), {})
    assert saved_steps(tmp_path) == []
    role.optimizer.step()
    assert not torch.equal(role.network.weight, then)  # type: ignore[arg-type]
    gate.set()
    writer.wait()
    assert torch.equal(saved_tensors(tmp_path, "line/weight/")["weight"], then)


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    network = torch.nn.Linear(5, 2)
    optimizer = make_optimizer(network.parameters(), OptimSection())
    other = Role("line", network, network, optimizer, lambda step: 0.1, 1.0)
    with pytest.raises(ValueError, match=r"line/weight/weight has shape \(2, 3\), expected \(2, 5\)"):
        read_state(tmp_path, other.pieces())
    other.name = "critic"
    with pytest.raises(ValueError, match=r"missing \['critic/exp_avg/bias'.*unexpected \['line/exp_avg/bias'"):
        read_state(tmp_path, other.pieces())


def test_files_say_what_they_hold(tmp_path: Path) -> None:
    save(tmp_path, 7)
    folder = tmp_path / "step_00000007"
    described = json.loads((folder / STATE_FILE).read_text())
    assert described["files"] == {"rank_00000.safetensors": (folder / "rank_00000.safetensors").stat().st_size}
    assert load_file(folder / "rank_00000.safetensors")["line/weight/weight"].shape == (6,)


def test_metrics_are_cut_where_the_run_continues(tmp_path: Path) -> None:
    train(LineTask(), settings(), tmp_path, accelerator())
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + whole[0][:20])  # torn by a kill
    truncate_metrics(path, 6)
    assert path.read_text().splitlines(keepends=True) == whole[:6]
    truncate_metrics(tmp_path / "absent.jsonl", 6)
    assert not (tmp_path / "absent.jsonl").exists()
