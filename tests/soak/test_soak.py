"""What takes too long for every change: twenty kills, and ten thousand steps whose memory stays flat. `make soak` runs it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import median

import pytest
import torch
from kills import run_and_kill
from recipe_world import World, arguments, read_metrics, train_here, train_on, weights, write_data, write_teacher
from tiny_world import tiny_arguments, tiny_world

from turbotrain.model.variants import VARIANTS

# Twenty kills, other ones for each engine; the seed alone chooses the kind, and each half has all four.
SEEDS = {"ddp": range(1, 11), "fsdp2": range(11, 21)}
STEPS, WARM_UP = 10_000, 1_000
MICRO = "micro"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", SEEDS)
def test_twenty_kills_change_nothing(engine: str, tmp_path: Path) -> None:
    """One process or both, anywhere or while a state is written."""
    world = tiny_world(tmp_path / "world")
    more = [
        f"launch.engine={engine}",
        "rcm.save_every=1",
        "sla.steps=10",
        "rcm.phases=[{cm: scm, dmd: true, steps: 40}]",
    ]
    whole, killed = (tiny_arguments(world, tmp_path / name, *more) for name in ("whole", "killed"))
    train_on(2, *whole)
    run = tmp_path / "killed" / "run"
    happened = [run_and_kill(killed, run, seed) for seed in SEEDS[engine]]
    print(engine, happened)
    assert "finished" not in happened
    assert len(set(happened)) == 4, "every kind of kill"
    train_on(2, *killed)
    for stage in ("sla", "rcm"):
        ours, theirs = weights(run / stage), weights(tmp_path / "whole" / "run" / stage)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), stage


@pytest.mark.timeout(3600)
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Resident memory after ten thousand steps, with a state every fifty, is that after the first thousand, to 2%."""
    shapes = VARIANTS["shapes"]
    config = dataclasses.replace(shapes.config, dim=16, ffn_dim=16, num_heads=1, num_layers=1, freq_dim=16)
    VARIANTS[MICRO] = dataclasses.replace(shapes, name=MICRO, config=config)
    world = World(write_teacher(tmp_path / "teacher", MICRO), write_data(tmp_path / "shards"))
    more = [
        f"model.variant={MICRO}",
        "stages=[sla]",
        f"sla.steps={STEPS}",
        "sla.save_every=50",
        "logging.log_every=1000",
    ]
    assert train_here(*arguments(world, tmp_path, *more)) == 0
    memory = [line["memory_gib"] for line in read_metrics(tmp_path / "run" / "sla")]
    assert len(memory) == STEPS
    before, after = (median(part) for part in (memory[WARM_UP : WARM_UP + 200], memory[-200:]))
    print(f"memory: {before * 1024:.1f} MiB after {WARM_UP} steps, {after * 1024:.1f} MiB after {STEPS}")
    assert after < 1.02 * before
