"""One tiny world, and one uninterrupted run in it, for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_world import World, arguments, train_here, write_data, write_teacher
from tiny_world import tiny_arguments, tiny_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return World(write_teacher(folder / "teacher"), write_data(folder / "shards"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tiny_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_whole(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of SLA and rCM of the tiny network, in one process without interruption."""
    output = tmp_path_factory.mktemp("tiny_whole")
    assert train_here(*tiny_arguments(tiny, output)) == 0
    return output / "run"


@pytest.fixture(scope="session")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of SLA and rCM without interruption."""
    output = tmp_path_factory.mktemp("whole")
    assert train_here(*arguments(world, output)) == 0
    return output / "run"
