"""The training loop of every stage: it reads from top to bottom, and knows nothing of what is trained.

A `Task` (one per stage) answers which network the step updates and with which loss; the loop updates it, guards it, logs it
and saves it. Everything random derives from (seed, step), so a loop that was killed and restarted ends with the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from turbotrain.training.log import StageLog
from turbotrain.training.parallel import Role, update
from turbotrain.training.state import load_state, save_state


class TrainingDiverged(RuntimeError):
    """Too many steps in a row gave a loss or gradient that is not finite; the last good state is on disk."""


@dataclass(frozen=True)
class StepLoss:
    """What a task wants done at one step: `role`'s network updated by the gradient of `loss`, `metrics` logged."""

    role: str
    loss: Tensor
    metrics: Mapping[str, Tensor | float]


class Task(Protocol):
    @property
    def roles(self) -> Mapping[str, Role]: ...

    def loss(self, step: int) -> StepLoss: ...

    def updated(self, role: Role) -> None:
        """Called after a network was updated (averages)."""

    def extra_state(self) -> dict[str, Tensor]:
        """What besides the roles must survive an interruption."""
        ...

    def load_extra_state(self, tensors: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class LoopSettings:
    title: str
    steps: int
    save_every: int
    sample_every: int
    max_bad_steps: int
    log_every: int
    keep_last: int


def train(
    task: Task,
    settings: LoopSettings,
    folder: Path,
    accelerator: Accelerator,
    sample: Callable[[int], None] | None = None,
) -> None:
    """Run `settings.steps` steps of `task`, continuing from the newest state under `folder/state`.

    Args:
        sample: called with the number of finished steps every `sample_every`, on rank 0.

    Raises:
        TrainingDiverged: `max_bad_steps` steps in a row were not finite; weights of the last finite step are saved.
    """
    states = folder / "state"
    start, extra = load_state(states, task.roles, accelerator.device)
    if extra:
        task.load_extra_state(extra)
    saved = start
    bad = 0

    def save(done: int) -> None:
        nonlocal saved
        if accelerator.is_main_process and done != saved:
            save_state(states, done, task.roles, task.extra_state(), settings.keep_last)
        saved = done
        accelerator.wait_for_everyone()

    with StageLog(folder, settings.title, settings.steps, start, settings.log_every, accelerator) as log:
        for step in range(start, settings.steps):
            began = time.perf_counter()
            wanted = task.loss(step)
            role = task.roles[wanted.role]
            norm, finite = update(accelerator, role, wanted.loss)
            if finite:
                task.updated(role)
            bad = 0 if finite else bad + 1
            values = _averaged(accelerator, {"loss": wanted.loss.detach(), **wanted.metrics})
            seconds = time.perf_counter() - began
            log.record(step, {"role": wanted.role, **values, "grad_norm": norm, "seconds": seconds})
            if bad >= settings.max_bad_steps:
                save(step + 1 - bad)
                raise TrainingDiverged(
                    f"{settings.title}: {bad} steps in a row without a finite loss or gradient (step {step}); the state after "
                    f"step {saved} is kept in {states}. Lower the learning rate or look at the data, then rerun to continue"
                )
            done = step + 1
            if bad == 0 and (done % settings.save_every == 0 or done == settings.steps):
                save(done)
            if sample and settings.sample_every and done % settings.sample_every == 0 and accelerator.is_main_process:
                sample(done)


def _averaged(accelerator: Accelerator, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Each metric's mean over the processes."""
    names = list(metrics)
    flat = torch.stack([torch.as_tensor(metrics[n], dtype=torch.float64, device=accelerator.device) for n in names])
    if accelerator.num_processes > 1:
        flat = cast(Tensor, accelerator.reduce(flat, reduction="mean"))
    return dict(zip(names, flat.tolist(), strict=True))
