"""The same small world with a network so small that a step takes hundredths of a second: for runs that are repeated often."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from recipe_world import World, arguments, write_data, write_teacher

from turbotrain.model.variants import VARIANTS

TINY = "tiny"


def register() -> None:
    """Known to recipes of this process, and to those that are forked from it."""
    shapes = VARIANTS["shapes"]
    config = dataclasses.replace(shapes.config, dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=32)
    VARIANTS[TINY] = dataclasses.replace(shapes, name=TINY, config=config)


def tiny_world(folder: Path) -> World:
    register()
    return World(write_teacher(folder / "teacher", TINY), write_data(folder / "shards"))


def tiny_arguments(world: World, output: Path, *more: str) -> list[str]:
    """Two steps of SLA, four of rCM (student, critic, student, critic), batches of four."""
    small = [
        f"model.variant={TINY}",
        "sla.steps=2",
        "sla.batch_size=4",
        "rcm.phases=[{cm: scm, dmd: false, steps: 1}, {cm: scm, dmd: true, steps: 3}]",
        "rcm.batch_size=4",
    ]
    return arguments(world, output, *small, *more)
