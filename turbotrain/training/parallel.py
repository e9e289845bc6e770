"""Processes and devices, through accelerate; the networks themselves are single-device code.

A `Role` is one trained network with its optimiser. Student and critic are two roles: each is wrapped on its own, so that
alternating updates never touch the other's gradients.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from turbotrain.config import Config, OptimSection
from turbotrain.model.wan import WanTransformer
from turbotrain.training.optim import learning_rate, make_optimizer


def make_accelerator(config: Config) -> Accelerator:
    """One Accelerator for the run; under torchrun or `accelerate launch` it joins the process group."""
    torch.set_float32_matmul_precision(config.launch.matmul_precision)
    on_cpu = config.launch.device == "cpu" or not torch.cuda.is_available()
    handlers: list = []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Stages that only the first process runs (evaluation, say) keep the others waiting for longer than the default.
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timedelta(hours=4)))
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=config.launch.mixed_precision,
        log_with=list(config.logging.trackers) or None,
        project_dir=str(config.run_folder),
        kwargs_handlers=handlers,
    )


@dataclass
class Role:
    """A trained network: `module` as wrapped for this launch, `network` the plain module inside."""

    name: str
    module: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    grad_clip: float
    updates: int = 0

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The plain network's trained parameters, under the names that checkpoints use."""
        return ((name, p) for name, p in self.network.named_parameters() if p.requires_grad)


def make_role(
    accelerator: Accelerator, name: str, network: WanTransformer, optim: OptimSection, updates: int, checkpointing: bool
) -> Role:
    """Wrap `network` and its optimiser for this launch; `updates`: how many it will get, for a decaying rate."""
    network.enable_activation_checkpointing(checkpointing).to(accelerator.device)
    optimizer = make_optimizer(network.parameters(), optim)
    module, optimizer = accelerator.prepare(network, optimizer)
    return Role(
        name, module, accelerator.unwrap_model(module), optimizer, learning_rate(optim, updates), optim.grad_clip
    )


def capture(network: nn.Module, inputs: tuple[Tensor, ...], accelerator: Accelerator) -> None:
    """Make training passes of `network` replay one CUDA graph each, for inputs of exactly these shapes; before `make_role`.

    A network of a million parameters is thousands of kernels that take longer to launch than to run. In evaluation mode it
    computes as before, for any shape.
    """
    # Autocast may not cache its casts: a graph must make them anew from the weights of the moment.
    mixed = accelerator.mixed_precision == "bf16"
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed, cache_enabled=False):
        torch.cuda.make_graphed_callables(network.train(), inputs)


def update(accelerator: Accelerator, role: Role, loss: Tensor) -> tuple[float, bool]:
    """One optimiser step on `loss`; returns the gradient norm and whether the step was taken.

    A loss or norm that is not finite leaves weights and optimiser state untouched. Both are taken over all processes, so
    every rank decides alike.
    """
    accelerator.backward(loss)
    norm = float(accelerator.clip_grad_norm_(role.module.parameters(), role.grad_clip) or 0.0)
    whole = loss.detach()
    if accelerator.num_processes > 1:
        whole = cast(Tensor, accelerator.reduce(whole, reduction="sum"))
    finite = math.isfinite(norm) and math.isfinite(float(whole))
    if finite:
        for group in role.optimizer.param_groups:
            group["lr"] = role.rate(role.updates)
        role.optimizer.step()
        role.updates += 1
    role.optimizer.zero_grad(set_to_none=True)
    return norm, finite
