"""A world in which whole recipes take seconds: a random teacher of the shapes variant, and eight samples in two shards."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from turbotrain.checkpoint import CheckpointMeta, save_checkpoint
from turbotrain.cli import train_main
from turbotrain.data.writing import Sample, write_shards
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS
from turbotrain.model.wan import WanTransformer

ROOT = Path(__file__).resolve().parents[2]
LATENT, EMBED = (24, 4, 8, 8), (32, 64)
OPTIMIZERS = ("sla.optim", "rcm.optim", "rcm.critic_optim")
SLA_STEPS, RCM_STEPS = 8, 8


@dataclass(frozen=True)
class World:
    teacher: Path
    shards: Path


def write_teacher(folder: Path, variant: str = "shapes", seed: int = 0) -> Path:
    """Random weights also where training starts from zero, so that every part has an effect; attention that is far from uniform,
    so that leaving blocks out costs something."""
    config = VARIANTS[variant].config
    network = WanTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            spread = 0.5 / max(1, parameter.shape[-1]) ** 0.5
            mean = 1.5 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + torch.randn(parameter.shape, generator=generator) * spread)
    attention = AttentionConfig("dense").to_dict()
    meta = CheckpointMeta(variant, config.to_dict(), attention, license="Apache-2.0")
    save_checkpoint(folder, network.state_dict(), meta)
    return folder


def samples(count: int = 8, seed: int = 1) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Sample(torch.randn(LATENT, generator=generator), torch.randn(EMBED, generator=generator), f"prompt {index}")
        for index in range(count)
    ]


def write_data(folder: Path, rows: list[Sample] | None = None) -> Path:
    write_shards(folder, samples() if rows is None else rows, torch.zeros(EMBED), 4, {"kind": "random"})
    return folder


def arguments(world: World, output: Path, *more: str) -> list[str]:
    """A command line that trains SLA and rCM with everything on: consistency, score term, critic, averages."""
    small = [
        "recipe=shapes",
        f"output_dir={output}",
        "name=run",
        "stages=[sla,rcm]",
        f"model.teacher={world.teacher}",
        "data.kind=shards",
        f"data.path={world.shards}",
        "launch.device=cpu",
        # What the tolerances were measured with, however the recipe is tuned.
        "attention=sla_small",
        "attention.topk=0.2",
        "sampler.times=[1.5,1.4,1.0]",
        *(f"{optim}.{setting}" for optim in OPTIMIZERS for setting in ("lr=5e-4", "warmup_steps=2", "decay=cosine")),
        "rcm.loss_scale=100",
        "rcm.tangent_form=rcm",
        f"sla.steps={SLA_STEPS}",
        "sla.batch_size=2",
        "sla.save_every=1",
        "rcm.phases=[{cm: scm, dmd: false, steps: 2}, {cm: scm, dmd: true, steps: 6}]",
        "rcm.tangent_warmup=1",
        "rcm.batch_size=2",
        "rcm.student_update_freq=2",
        "rcm.save_every=2",
    ]
    return [*small, *more]


def train_here(*overrides: str) -> int:
    """The exit status of `train.py` with these overrides, in this process."""
    return train_main(list(overrides))


def train_on(processes: int, *overrides: str) -> None:
    """`train_here` on several processes, forked: a second instead of the fifteen of a launch. Raises if one fails."""
    context = start_on(processes, *overrides)
    while not context.join():
        pass


def start_on(processes: int, *overrides: str) -> mp.ProcessContext:
    """The same without waiting."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (processes, port, list(overrides))
    context = mp.start_processes(_one_of, args=arguments, nprocs=processes, join=False, start_method="fork")
    assert context is not None
    return context


def _one_of(rank: int, processes: int, port: int, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in {**ranks, **where}.items()})
    status = train_here(*overrides)
    if status:
        raise SystemExit(status)


def command(overrides: list[str], processes: int = 1) -> list[str]:
    """The same as a command line of its own, under torchrun for more than one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stage.json").read_text())


def weights(stage: Path) -> dict[str, Tensor]:
    return load_file(stage / "checkpoint" / "model.safetensors")


def wait_for_step(folder: Path, step: int, seconds: float = 120) -> None:
    """Until metrics.jsonl tells of `step`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_metrics(folder)):
            return
        time.sleep(0.002)
    raise TimeoutError(f"{folder}: step {step} did not come within {seconds} s")
