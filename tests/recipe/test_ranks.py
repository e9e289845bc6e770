"""Two processes train what one does: same stages, same losses to rounding at equal global batch, one set of files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from recipe_world import World, arguments, command, environment, read_metrics, weights
from safetensors.torch import load_file

# Sums over a batch are taken in another order. Before any update that is rounding alone (measured: 6e-7); afterwards Adam
# amplifies it where gradients are small (measured: 2e-5 within eight steps).
FIRST_STEP, LATER = 5e-6, 1e-4


@pytest.mark.slow
def test_two_ranks_train_as_one_does(world: World, whole: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(arguments(world, tmp_path), processes=2),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sla: starting") == 1, "only rank 0 speaks"
    assert_same_run(tmp_path / "run", whole, world)


def assert_same_run(run: Path, whole: Path, world: World, stages: tuple[str, ...] = ("sla", "rcm")) -> None:
    """The same files, losses to rounding, and weights that went the same way."""
    files = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    assert files == {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    for stage in stages:
        lines, expected = read_metrics(run / stage), read_metrics(whole / stage)
        assert [(line["step"], line["role"]) for line in lines] == [(line["step"], line["role"]) for line in expected]
        for line, other in zip(lines, expected, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=LATER if line["step"] else FIRST_STEP), (
                stage,
                line["step"],
            )
        assert_weights_agree(run / stage, whole / stage, world.teacher)


def assert_weights_agree(one: Path, other: Path, teacher: Path) -> None:
    """The difference is small beside the way that training went."""
    start = load_file(teacher / "model.safetensors")
    left, right = weights(one), weights(other)
    moved = apart = 0.0
    for name, value in start.items():
        moved += float((right[name] - value).double().square().sum())
        apart += float((right[name] - left[name]).double().square().sum())
    assert moved > 0
    assert apart**0.5 < 0.05 * moved**0.5
