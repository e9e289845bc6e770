"""Optimisers and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from turbotrain.compose import UsageError
from turbotrain.config import OptimSection

BLOCK = 256  # 8-bit moments that share a scale
CODES, SCALE = "_codes", "_scale"


def make_optimizer(parameters: Iterable[nn.Parameter], optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW of `optim.kind`, fused or not, with its state in place."""
    if optim.kind == "adamw_8bit":
        return new_adamw_8bit(parameters, optim)
    optimizer = new_adamw(parameters, optim)
    allocate_state(optimizer, optimizer.param_groups[0]["params"])
    return optimizer


def new_adamw(parameters: Iterable[nn.Parameter], optim: OptimSection) -> torch.optim.AdamW:
    """AdamW as torch makes it: its state comes with the first step."""
    trained = [p for p in parameters if p.requires_grad]
    first, second = optim.betas
    # Shards that rest in host memory, too: seconds instead of minutes for billions of parameters.
    fused = optim.fused and all(p.is_cuda or isinstance(p, DTensor) for p in trained)
    return torch.optim.AdamW(
        trained, lr=optim.lr, betas=(first, second), eps=optim.eps, weight_decay=optim.weight_decay, fused=fused
    )


def allocate_state(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Make the state of these parameters now, so that memory is known before training begins and a saved state has something
    to fill."""
    fused = bool(optimizer.defaults["fused"])
    for p in parameters:
        # A fused AdamW keeps its step count on the parameter's device, a plain one on the CPU.
        step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def new_adamw_8bit(parameters: Iterable[nn.Parameter], optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW whose moments are 8 bits with a float32 scale for every 256 (arXiv 2110.02861), by torchao; with its state in place.

    Only of matrices whose rows are whole blocks: their shards then are too, whatever the number of processes.

    Raises:
        UsageError: torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports] (an extra)
        from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("optim.kind=adamw_8bit: needs torchao; pip install turbotrain[optim8]") from error

    trained = [p for p in parameters if p.requires_grad]
    first, second = optim.betas
    optimizer: torch.optim.Optimizer = AdamW8bit(
        trained, lr=optim.lr, betas=(first, second), eps=optim.eps, weight_decay=optim.weight_decay, block_size=BLOCK
    )

    def zeros(p: Tensor, signed: bool) -> Tensor:
        if p.ndim != 2 or p.shape[1] % BLOCK:
            return torch.zeros_like(p)
        local = p.to_local() if isinstance(p, DTensor) else p
        moment = OptimState8bit.zeros(local.shape, signed, BLOCK, local.device, dtype=p.dtype)
        if not isinstance(p, DTensor):
            return moment
        whole = {"shape": p.shape, "stride": p.stride(), "run_check": False}
        return DTensor.from_local(moment, p.device_mesh, p.placements, **whole)

    for p in trained:
        optimizer.state[p] = {
            "step": torch.tensor(0.0),
            "exp_avg": zeros(p.detach(), signed=True),
            "exp_avg_sq": zeros(p.detach(), signed=False),
        }
    return optimizer


def stored(state: Tensor) -> dict[str, Tensor]:
    """The plain tensors of one state, by the suffix of their names: an 8-bit moment's codes and scales."""
    codes, scale = getattr(state, "codes", None), getattr(state, "scale", None)
    return {"": state} if codes is None or scale is None else {CODES: codes, SCALE: scale}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the moment, in the place where the optimiser reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(optim: OptimSection, steps: int) -> Callable[[int], float]:
    """lr as a function of the step: linear warm-up, then constant or a cosine to zero at `steps`."""

    def at(step: int) -> float:
        warm = min(1.0, (step + 1) / (optim.warmup_steps + 1))
        fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if optim.decay == "cosine" else 1.0
        return optim.lr * warm * fall

    return at
