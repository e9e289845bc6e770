"""Killed three times, one process or both, also while a state is written, a run ends with the weights of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kills import run_and_kill
from recipe_world import World, read_status, train_on, weights
from tiny_world import tiny_arguments

from turbotrain.training.state import newest_state

SEEDS = (2, 1, 4)
MORE = ("rcm.save_every=1", "sla.steps=3", "rcm.phases=[{cm: scm, dmd: true, steps: 5}]")


@pytest.mark.slow
def test_three_kills_change_nothing(tiny: World, tmp_path: Path) -> None:
    whole, killed = (tiny_arguments(tiny, tmp_path / name, *MORE) for name in ("whole", "killed"))
    train_on(2, *whole)
    run = tmp_path / "killed" / "run"
    happened = [run_and_kill(killed, run, seed) for seed in SEEDS]
    # The seeds were chosen so that each kind comes once; a kill that comes too late would test nothing.
    assert sorted(happened) == ["killed both while writing", "killed one", "killed one while writing"]
    assert read_status(run / "sla")["status"] in ("running", "done")
    torn = list(run.glob("*/state/.tmp-step_*"))
    assert torn, "the kill while writing left nothing half-written"
    assert all(newest_state(folder.parent) != folder for folder in torn)
    train_on(2, *killed)
    for stage in ("sla", "rcm"):
        ours, theirs = weights(run / stage), weights(tmp_path / "whole" / "run" / stage)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), stage
    assert not list(run.rglob(".tmp-*"))
