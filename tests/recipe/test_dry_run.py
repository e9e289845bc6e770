"""Every recipe: its plan, with its network built on the meta device, without writing anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_world import World, arguments, train_here

from turbotrain.compose import recipe_names
from turbotrain.config import load_config
from turbotrain.model.variants import VARIANTS


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_dry_runs(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(f"recipe={recipe}", "dry_run=true", f"output_dir={tmp_path / 'out'}") == 0
    title, *lines = capsys.readouterr().out.splitlines()
    config = load_config([f"recipe={recipe}"])
    variant = VARIANTS[config.model.variant]
    shape = variant.latent_shape(config.data.frames, config.data.height, config.data.width)
    assert title.startswith(f"{recipe}: {variant.name}, ")
    assert f"latent {shape}" in title
    assert [line.split(":")[0].strip() for line in lines] == list(config.stages)
    if variant.vae != "shapes":
        assert "teacher <- needs a teacher: set model.teacher" in lines[0]
        assert "data <- needs shards of latents" in lines[0]
    assert not (tmp_path / "out").exists()


def test_parameters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Published sizes: 1.3B and 14B, with SLA's projections (128 x 128 + 128 a layer and none for heads)."""
    assert train_here("recipe=wan2.1_t2v_1.3b_480p", "dry_run=true") == 0
    assert " 1419.49M parameters" in capsys.readouterr().out


def test_the_plan_names_what_is_not_there(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = World(tmp_path / "nowhere", world.shards)
    assert train_here(*arguments(missing, tmp_path / "out", "dry_run=true")) == 0
    printed = capsys.readouterr().out
    assert f"teacher <- {tmp_path / 'nowhere'} (not there)" in printed
    assert f"data <- {world.shards}," in printed
    assert f"sla <- {tmp_path / 'out' / 'run' / 'sla' / 'checkpoint'}" in printed


def test_a_dry_run_still_refuses_a_bad_file(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = arguments(world, tmp_path / "out", "model=wan2.1_t2v_14b", f"model.teacher={world.teacher}")
    assert train_here(*overrides, "dry_run=true") in (1, 2)
    assert "variant=wan2.1_t2v_14b" in capsys.readouterr().err


def test_the_plan_says_what_is_done_and_what_a_setting_makes_stale(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*overrides: str) -> list[str]:
        assert train_here(*arguments(world, tmp_path, *overrides, "dry_run=true")) == 0
        return capsys.readouterr().out.splitlines()[1:]

    assert [line.split(": ")[1].startswith("[") for line in plan()] == [False, False]
    assert train_here(*arguments(world, tmp_path, "stages=[sla]")) == 0
    capsys.readouterr()
    sla, rcm = plan()
    assert sla.startswith("  sla: [done: skipped] ")
    assert rcm.startswith("  rcm: teacher <- ")
    sla, _ = plan("sla.optim.lr=3e-5")
    assert sla.startswith("  sla: [stale (sla.optim.lr:")
    assert "runs again] " in sla
