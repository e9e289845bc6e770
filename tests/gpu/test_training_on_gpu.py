"""Training and generation on a GPU agree with what the CPU and plain launches compute."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from recipe_world import World, arguments, command, read_metrics, train_here, weights, write_data, write_teacher

from turbotrain.checkpoint.io import load_transformer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return World(write_teacher(folder / "teacher"), write_data(folder / "shards"))


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of SLA, rCM (consistency, score, critic) and quantization, all on the GPU."""
    output = tmp_path_factory.mktemp("trained")
    assert train_here(*arguments(world, output, "launch.device=cuda", "stages=[sla,rcm]")) == 0
    return output / "run"


# Steps enough for every kind of step to be recorded and replayed twice.
GRAPHED = {
    "teacher": ["teacher.steps=6", "teacher.batch_size=4", "teacher.optim.lr=1e-3", "teacher.optim.warmup_steps=0"],
    "sla": ["sla.caption_dropout=0.5"],
    "rcm": [
        "rcm.composition=joint",
        "rcm.tangent_warmup=8",  # which replayed steps see at .75 and .875
        "rcm.phases=[{cm: dcm, dmd: false, steps: 4}, {cm: scm, dmd: false, steps: 4}, {cm: scm, dmd: true, steps: 32}]",
    ],
}


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 1e-2)])
@pytest.mark.parametrize("stage", GRAPHED)
def test_a_network_trained_from_graphs_is_the_one_trained_without(
    world: World, tmp_path: Path, stage: str, precision: str, tolerance: float
) -> None:
    losses = {}
    for graphed in (False, True):
        more = ["launch.device=cuda", f"stages=[{stage}]", *GRAPHED[stage]]
        more += [f"launch.cuda_graph={graphed}", f"launch.mixed_precision={precision}", f"name=graph_{graphed}"]
        # A process each: accelerate keeps one precision for a process's whole life.
        ran = subprocess.run(command(arguments(world, tmp_path, *more)), check=True, capture_output=True, text=True)
        assert "no CUDA graph" not in ran.stderr
        losses[graphed] = [line["loss"] for line in read_metrics(tmp_path / f"graph_{graphed}" / stage)]
    assert len(losses[True]) == len(losses[False])
    assert losses[True] == pytest.approx(losses[False], rel=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_average_the_gradients_of_their_graphs(world: World, tmp_path: Path) -> None:
    losses = {}
    for processes in (1, 2):
        more = ["launch.device=cuda", "stages=[sla]", *GRAPHED["sla"], "launch.cuda_graph=true", f"name=on_{processes}"]
        subprocess.run(command(arguments(world, tmp_path, *more), processes), check=True)
        losses[processes] = [line["loss"] for line in read_metrics(tmp_path / f"on_{processes}" / "sla")]
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


def test_sla_and_rcm_train_on_the_gpu(trained: Path) -> None:
    for stage in ("sla", "rcm"):
        lines = read_metrics(trained / stage)
        assert len(lines) == 8
        assert all(line["loss"] == line["loss"] for line in lines)
        assert all(tensor.isfinite().all() for tensor in weights(trained / stage).values())


def test_one_network_computes_the_same_on_cpu_and_gpu(trained: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    x, context = torch.randn(3, 24, 4, 8, 8, generator=generator), torch.randn(3, 32, 64, generator=generator)
    timestep = torch.tensor([11.0, 500.0, 990.0])
    checkpoint = trained / "rcm" / "checkpoint"
    with torch.no_grad():
        exact = load_transformer(checkpoint, dtype=torch.float64)(x.double(), timestep.double(), context.double())
        plain = load_transformer(checkpoint, dtype=torch.float32)(x, timestep, context)
        network = load_transformer(checkpoint, device="cuda", dtype=torch.float32)
        got = network(x.cuda(), timestep.cuda(), context.cuda())
    error, allowed = (got.cpu() - exact).norm(), (plain - exact).norm()
    assert error <= 2 * allowed + 2.0**-24 * exact.norm()
