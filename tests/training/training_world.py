"""The smallest thing that trains: a line fitted to points, as a Task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from turbotrain.config import GuardSection, OptimSection
from turbotrain.training.ema import PowerEMA
from turbotrain.training.loop import LoopSettings, Plan, Term
from turbotrain.training.optim import learning_rate, make_optimizer
from turbotrain.training.roles import Role
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
    """Two lines trained in turn, the even one with an average, in `parts` micro-batches; `spoil(step, loss)` may replace a
    loss. phase: of a step."""

    def __init__(
        self,
        spoil: Callable[[int, Tensor], Tensor] = lambda step, loss: loss,
        parts: int = 1,
        phase: Callable[[int], str] = lambda step: "",
    ) -> None:
        self.roles = {"even": line_role("even"), "odd": line_role("odd")}
        self.average = self.roles["even"].average = PowerEMA(self.roles["even"].weights())
        self.spoil = spoil
        self.parts = parts
        self.phase = phase
        self.draws: list[int] = []

    def plan(self, step: int, draw: int) -> Plan:
        self.draws.append(draw)
        random = StepRandom(7, draw, 4, range(4), torch.device("cpu"))
        role = self.roles["odd" if step % 2 else "even"]

        def term(points: Tensor) -> Term:
            loss = (role.module(points) - 1).square().mean()
            return Term(self.spoil(step, loss), {"step_twice": 2.0 * step})

        points = random.normal("x", (3,)).chunk(self.parts)
        return Plan(role.name, [lambda x=x: term(x) for x in points], self.parts, phase=self.phase(step))


def settings(
    steps: int = 10,
    save_every: int = 3,
    max_bad_steps: int = 3,
    sample_every: int = 0,
    guard: GuardSection | None = None,
    walltime_minutes: float = 0.0,
    profile_steps: tuple[int, ...] = (),
) -> LoopSettings:
    return LoopSettings(
        "line",
        steps,
        save_every,
        sample_every,
        max_bad_steps,
        log_every=100,
        keep_last=2,
        guard=guard or GuardSection(),
        walltime_minutes=walltime_minutes,
        profile_steps=profile_steps,
    )


def state(task: LineTask) -> dict[str, Tensor]:
    weights = {
        f"{name}.{key}": value.clone()
        for name, role in task.roles.items()
        for key, value in role.network.state_dict().items()
    }
    return weights | {f"average.{key}": value.clone() for key, value in task.average.shadow.items()}


def accelerator() -> Accelerator:
    return Accelerator(cpu=True)
