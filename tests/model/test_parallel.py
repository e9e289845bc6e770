"""The network under DDP and FSDP2 on two processes: tangents and gradients equal those of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from wan_networks import build, inputs, relative, tangents_of

from turbotrain.model.attention_config import AttentionConfig

SLA = AttentionConfig("sla", 0.5, 16, 16)
GRID = (3, 6, 8)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    whole = build("i2v_clip", SLA)
    given = inputs(whole.config, grid=GRID)
    tangents = tangents_of(given)
    expected_v, expected_tv = whole(**given, tangents=tangents)
    expected_v.square().mean().backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}

    mine = slice(rank, rank + 1)
    share = {name: value[mine] for name, value in given.items()}
    for strategy in ("ddp", "fsdp2"):
        model = build("i2v_clip", SLA).enable_activation_checkpointing()
        wrapped: torch.nn.Module = model
        if strategy == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        v, tv = wrapped(**share, tangents=(tangents[0][mine], tangents[1][mine]))
        v.square().mean().backward()
        assert relative(v, expected_v[mine]) < 1e-6
        assert relative(tv, expected_tv[mine]) < 1e-6
        for name, parameter in model.named_parameters():
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            assert grad is not None
            reference = expected[name]
            assert reference is not None
            assert (grad - reference).norm() <= 2e-5 * reference.norm() + 1e-9, (strategy, name)
    dist.destroy_process_group()


def test_ddp_and_fsdp2_match_one_process(tmp_path: Path) -> None:
    mp.start_processes(_worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
