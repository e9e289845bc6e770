"""The smallest thing that trains: a line fitted to points, as a Task."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from turbotrain.config import OptimSection
from turbotrain.training.loop import LoopSettings, StepLoss
from turbotrain.training.optim import learning_rate, make_optimizer
from turbotrain.training.parallel import Role
from turbotrain.training.seeding import StepRandom


def line_role(name: str = "line", optim: OptimSection | None = None, steps: int = 10) -> Role:
    optim = optim or OptimSection(lr=0.01)
    torch.manual_seed(3)
    network = nn.Linear(3, 2)
    return Role(
        name,
        network,
        network,
        make_optimizer(network.parameters(), optim),
        learning_rate(optim, steps),
        optim.grad_clip,
    )


class LineTask:
    """Two lines trained in turn; `spoil(step, loss)` may replace a loss."""

    def __init__(self, spoil: Callable[[int, Tensor], Tensor] = lambda step, loss: loss) -> None:
        self.roles = {"even": line_role("even"), "odd": line_role("odd")}
        self.spoil = spoil
        self.counted = torch.zeros(())

    def loss(self, step: int) -> StepLoss:
        random = StepRandom(7, step, 4, range(4), torch.device("cpu"))
        role = self.roles["odd" if step % 2 else "even"]
        loss = (role.module(random.normal("x", (3,))) - 1).square().mean()
        return StepLoss(role.name, self.spoil(step, loss), {"step_twice": 2.0 * step})

    def updated(self, role: Role) -> None:
        self.counted = self.counted + 1

    def extra_state(self) -> dict[str, Tensor]:
        return {"counted": self.counted}

    def load_extra_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.counted = tensors["counted"]


def settings(steps: int = 10, save_every: int = 3, max_bad_steps: int = 3, sample_every: int = 0) -> LoopSettings:
    return LoopSettings("line", steps, save_every, sample_every, max_bad_steps, log_every=100, keep_last=2)


def state(task: LineTask) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, role in task.roles.items()
        for key, value in role.network.state_dict().items()
    }


def accelerator() -> Accelerator:
    return Accelerator(cpu=True)
