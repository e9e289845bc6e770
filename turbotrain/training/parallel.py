"""Processes and devices, through accelerate; the networks themselves are single-device code.

Which engine wraps them is what `accelerate launch --config_file configs/accelerate/<engine>.yaml` says, or `launch.engine`.
accelerate starts the processes, joins them and carries logs. The wrapping of sharded engines is done here, a network at a
time: accelerate keeps one DeepSpeed plugin and one list of FSDP modules for a process, and steps or clips the wrong network where
two are trained in turn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from turbotrain.compose import UsageError
from turbotrain.config import Config, LaunchSection, OptimSection
from turbotrain.model.lora import has_lora
from turbotrain.model.quant_linear import prepare_for_inference, quantize_block_linears
from turbotrain.model.wan import WanTransformer
from turbotrain.training.bring import bring
from turbotrain.training.optim import learning_rate, make_optimizer
from turbotrain.training.roles import BareRole, Role

# What accelerate's launcher tells its processes. Cleared once read, so that its Accelerator leaves the wrapping to us.
DEEPSPEED_FLAG, ZERO_STAGE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"
FSDP_FLAG, FSDP_VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"


def choose_engine(launch: LaunchSection, environ: Mapping[str, str]) -> str:
    """The engine of this launch: ddp (also for one process), fsdp2, zero2 or zero3.

    Raises:
        UsageError: the launcher's file and `launch.engine` disagree, or name an engine that is not supported.
    """
    told = ""
    if environ.get(FSDP_FLAG, "").lower() == "true":
        if environ.get(FSDP_VERSION, "1") != "2":
            raise UsageError(
                f"fsdp_version={environ.get(FSDP_VERSION, '1')}: only FSDP2 is supported; set fsdp_version: 2 in the launch file"
            )
        told = "fsdp2"
    if environ.get(DEEPSPEED_FLAG, "").lower() == "true":
        stage = environ.get(ZERO_STAGE, "")
        if stage not in ("2", "3"):
            raise UsageError(
                f"zero_stage={stage or 'auto'}: set zero_stage: 2 or 3 in the launch file's deepspeed_config"
            )
        told = f"zero{stage}"
    if launch.engine == "auto":
        return told or "ddp"
    if told and told != launch.engine:
        raise UsageError(f"launch.engine={launch.engine!r}: the launch file says {told}; leave one of the two out")
    return launch.engine


@cache
def _context_mesh(device_type: str, size: int) -> DeviceMesh:
    return init_device_mesh(device_type, (dist.get_world_size() // size, size), mesh_dim_names=("data", "context"))


def context_group(accelerator: Accelerator, launch: LaunchSection) -> ProcessGroup | None:
    """The neighbouring processes that share this one's samples; None where each has its own."""
    if launch.context_parallel == 1:
        return None
    return _context_mesh(accelerator.device.type, launch.context_parallel).get_group("context")


def data_share(accelerator: Accelerator, launch: LaunchSection) -> tuple[int, int]:
    """(which, of how many) equal shares of the global batch this process works on; a context group has one together."""
    size = launch.context_parallel
    return accelerator.process_index // size, accelerator.num_processes // size


def make_accelerator(config: Config) -> Accelerator:
    """One Accelerator for the run; under torchrun or `accelerate launch` it joins the process group.

    Its mixed precision is off: roles run their networks under autocast themselves, the same way under every engine.
    """
    torch.set_float32_matmul_precision(config.launch.matmul_precision)
    on_cpu = config.launch.device == "cpu" or not torch.cuda.is_available()
    handlers: list = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Stages that only the first process runs (evaluation, say) keep the others waiting for longer than the default.
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timedelta(hours=4)))
    for flag in (FSDP_FLAG, DEEPSPEED_FLAG):
        os.environ.pop(flag, None)
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no",
        log_with=list(config.logging.trackers) or None,
        project_dir=str(config.run_folder),
        kwargs_handlers=handlers,
    )


def make_role(
    accelerator: Accelerator,
    launch: LaunchSection,
    engine: str,
    name: str,
    network: WanTransformer,
    optim: OptimSection,
    updates: int,
) -> Role:
    """Wrap `network` and its optimiser for this launch; `updates`: how many it will get, for a decaying rate."""
    network.share_tokens(context_group(accelerator, launch))
    network.enable_activation_checkpointing(launch.activation_checkpointing, launch.checkpoint_every)
    network.compile_element_wise(launch.compile and accelerator.device.type == "cuda")
    if launch.mixed_precision == "bf16":
        autocast_forward(network, accelerator.device)
    rate = learning_rate(optim, updates)
    if engine == "fsdp2" and accelerator.num_processes > 1:
        from turbotrain.training.fsdp import ShardedRole, shard

        shard(network, accelerator.device, offload=launch.offload)
        optimizer = make_optimizer(network.parameters(), optim)
        return ShardedRole(name, network, network, optimizer, rate, optim.grad_clip)
    if not has_lora(network):  # which lies over weights that are there already
        bring(network, accelerator.device)
    if engine.startswith("zero"):
        from turbotrain.training.zero import zero_role

        return zero_role(name, network, optim, rate, int(engine[-1]), launch.offload)
    optimizer = make_optimizer(network.parameters(), optim)
    if accelerator.num_processes > 1 and replays_steps(accelerator, launch, engine):
        return BareRole(name, network, network, optimizer, rate, optim.grad_clip)
    return Role(name, accelerator.prepare_model(network), network, optimizer, rate, optim.grad_clip)


def replays_steps(accelerator: Accelerator, launch: LaunchSection, engine: str) -> bool:
    """Whether steps are recorded as CUDA graphs and replayed: on GPUs, of networks that lie whole on each."""
    return launch.cuda_graph and accelerator.device.type == "cuda" and engine == "ddp"


def make_frozen(
    accelerator: Accelerator, launch: LaunchSection, engine: str, network: WanTransformer, scheme: str = ""
) -> WanTransformer:
    """A network that only answers (the teacher): without gradients, in bf16 under mixed precision (its float32 islands
    stay), sharded where the trained ones are.

    scheme: of 8-bit linears in its blocks; it then lies whole on every process, which needs no gathering and less memory than
    halves of the weights in bf16 would.
    """
    network.requires_grad_(False).share_tokens(context_group(accelerator, launch))
    for block in network.blocks if scheme else ():
        # On the device, block by block: the whole network in floats need not fit there.
        bring(block, accelerator.device)
        quantize_block_linears(block, scheme)
    dtype = torch.bfloat16 if launch.mixed_precision == "bf16" else torch.float32
    if engine in ("fsdp2", "zero3") and accelerator.num_processes > 1 and not scheme:
        from turbotrain.training.fsdp import shard

        return shard(network, accelerator.device, dtype)
    bring(network, accelerator.device, dtype)
    if scheme:
        prepare_for_inference(network)
    return network


def autocast_forward(network: nn.Module, device: torch.device) -> None:
    """bf16 products of float32 weights, in every forward of `network`, inside whatever wraps it later. Casts are not cached: a
    second copy of all weights would outlive the pass."""
    network.forward = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)(network.forward)
