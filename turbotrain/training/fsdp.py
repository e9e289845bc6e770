"""FSDP2: weights, gradients and optimiser states sharded over the processes, block by block.

torch's `fully_shard` is applied here rather than by `Accelerator.prepare`, which turns FSDP2 into DDP on CPUs and clips
the gradients of the wrong network where two are trained.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from turbotrain.model.wan import WanTransformer
from turbotrain.training.bring import bring
from turbotrain.training.roles import Role


@cache
def _mesh(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (dist.get_world_size(),))


def shard(
    network: WanTransformer, device: torch.device, dtype: torch.dtype = torch.float32, offload: bool = False
) -> WanTransformer:
    """Shard `network` in place, in `dtype`: one unit a block, one for the rest. Weights are gathered in the precision they are
    stored in, so that float32 islands stay float32 and every engine computes with the same numbers. Of weights that lie in files
    a process takes a block at a time and keeps its share of it.

    offload: shards and optimiser states rest in host memory.
    """
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    mesh = _mesh(device.type)
    for block in network.blocks:
        bring(block, device, dtype)
        fully_shard(block, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    # The root too: a pass without gradient is followed by no backward pass that would shard it again.
    bring(network, device, dtype)
    fully_shard(network, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    return network


class ShardedRole(Role):
    """A role under FSDP2. Each loss's gradient is reduced at once: keeping it whole until the last would take the memory that
    sharding saves."""

    @property
    def needs_all_ranks(self) -> bool:
        return True

    def norm(self) -> Tensor:
        # Of this process's shards, summed where collectives run: shards that rest in host memory have none of their own.
        shards = [p.grad.to_local() for p in self.parameters.values() if isinstance(p.grad, DTensor)]
        mesh = next(p.device_mesh for p in self.parameters.values() if isinstance(p, DTensor))
        squared = torch.nn.utils.get_total_norm(shards).to(mesh.device_type).square()
        dist.all_reduce(squared, group=mesh.get_group())
        return squared.sqrt()
