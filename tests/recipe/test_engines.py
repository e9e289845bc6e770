"""Every engine trains what one process does: SLA and rCM with tangents, critic and averages at equal global batch. What one
engine saved, another world size continues."""

from __future__ import annotations

import itertools
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from recipe_world import World, train_here, train_on, weights
from test_ranks import assert_same_run, assert_weights_agree
from tiny_world import tiny_arguments
from torch.multiprocessing import ProcessExitedException

from turbotrain.compose import UsageError
from turbotrain.config import LaunchSection
from turbotrain.training.interrupt import Interruption
from turbotrain.training.parallel import choose_engine

STOP_AT = 4  # of the two steps of SLA and the four of rCM


NO_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
SHARDED = ["fsdp2", *(pytest.param(name, marks=NO_DEEPSPEED) for name in ("zero2", "zero3"))]


@pytest.fixture(scope="module", params=SHARDED)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def sharded(engine: str, tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny network under a sharded engine, each rank's share in two micro-batches."""
    output = tmp_path_factory.mktemp("sharded")
    train_on(2, *tiny_arguments(tiny, output, f"launch.engine={engine}", "launch.micro_batches=2"))
    return output / "run"


@pytest.fixture(scope="module")
def stopped(engine: str, tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the same, asked to stop in the middle of rCM."""
    output = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        asked = itertools.count(1)
        patch.setattr(Interruption, "asks_to_stop", lambda self: next(asked) == STOP_AT)
        with pytest.raises(ProcessExitedException, match="exit code 1"):
            train_on(2, *tiny_arguments(tiny, output, f"launch.engine={engine}", "launch.micro_batches=2"))
    return output


def test_a_sharded_engine_trains_as_one_process_does(sharded: Path, tiny: World, tiny_whole: Path) -> None:
    assert_same_run(sharded, tiny_whole, tiny)


def test_products_in_bf16_round_the_same(engine: str, tiny: World, tmp_path: Path) -> None:
    more = ["stages=[sla]", "sla.steps=1", "launch.mixed_precision=bf16"]
    assert train_here(*tiny_arguments(tiny, tmp_path / "one", *more)) == 0
    train_on(2, *tiny_arguments(tiny, tmp_path / "two", *more, f"launch.engine={engine}"))
    # The first step of Adam moves every weight by about as much, whatever the size of its gradient: signs must agree.
    assert_weights_agree(tmp_path / "two" / "run" / "sla", tmp_path / "one" / "run" / "sla", tiny.teacher)


def test_ddp_sums_over_micro_batches_and_losses(tiny: World, tiny_whole: Path, tmp_path: Path) -> None:
    train_on(2, *tiny_arguments(tiny, tmp_path, "launch.micro_batches=2"))
    assert_same_run(tmp_path / "run", tiny_whole, tiny)


def test_checkpointed_blocks_and_micro_batches_change_nothing(tiny: World, tiny_whole: Path, tmp_path: Path) -> None:
    more = ["launch.micro_batches=4", "launch.activation_checkpointing=true", "launch.checkpoint_every=2"]
    assert train_here(*tiny_arguments(tiny, tmp_path, *more)) == 0
    assert_same_run(tmp_path / "run", tiny_whole, tiny)


def test_a_state_is_spread_over_the_ranks(engine: str, stopped: Path) -> None:
    (state,) = (stopped / "run" / "rcm" / "state").glob("step_00000002")
    described = json.loads((state / "state.json").read_text())
    assert described["world"] == 2
    sizes = list(described["files"].values())
    assert len(sizes) == 2
    # ZeRO-2 spreads the optimiser's states alone; the first rank also writes the weights and averages.
    assert max(sizes) < (4 if engine == "zero2" else 1.2) * min(sizes)


def test_the_same_world_size_continues_bit_for_bit(
    engine: str, stopped: Path, sharded: Path, tiny: World, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    train_on(2, *tiny_arguments(tiny, tmp_path, f"launch.engine={engine}", "launch.micro_batches=2"))
    ours, theirs = (weights(run / "rcm") for run in (tmp_path / "run", sharded))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_process_continues_what_two_sharded(stopped: Path, tiny: World, tiny_whole: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    assert train_here(*tiny_arguments(tiny, tmp_path)) == 0
    assert_same_run(tmp_path / "run", tiny_whole, tiny)


LAUNCHERS = [
    ({}, "ddp"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
]


@pytest.mark.parametrize(("environ", "engine"), LAUNCHERS)
def test_the_launch_file_chooses_the_engine(environ: dict[str, str], engine: str) -> None:
    assert choose_engine(LaunchSection(), environ) == engine
    assert choose_engine(LaunchSection(engine=engine), environ) == engine
    other = "ddp" if engine == "fsdp2" else "fsdp2"
    if environ:
        with pytest.raises(UsageError, match=f"launch.engine='{other}': the launch file says {engine}"):
            choose_engine(LaunchSection(engine=other), environ)


def test_launchers_that_are_not_supported_are_refused() -> None:
    with pytest.raises(UsageError, match="fsdp_version=1: only FSDP2"):
        choose_engine(LaunchSection(), {"ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(UsageError, match="zero_stage=1: set zero_stage: 2 or 3"):
        choose_engine(LaunchSection(), {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"})


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_zero_without_deepspeed_says_what_to_install(
    tiny: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny_arguments(tiny, tmp_path, "launch.engine=zero2")) == 2
    assert "pip install turbotrain[deepspeed]" in capsys.readouterr().err
