"""The training loop of every stage: it reads from top to bottom, and knows nothing of what is trained.

A `Task` (one per stage) plans which network a step updates and with which losses; the loop takes their gradients one after the
other, judges the step, takes it, logs it and saves it. Everything random derives from (seed, step), so a loop that was
killed and restarted ends with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from turbotrain.config import GuardSection
from turbotrain.training.best import Best
from turbotrain.training.graphs import StepGraph, Sums
from turbotrain.training.guard import Guard
from turbotrain.training.interrupt import Interruption, Stopped
from turbotrain.training.log import StageLog
from turbotrain.training.meter import Meter, Work
from turbotrain.training.pieces import Piece
from turbotrain.training.profile import profiled
from turbotrain.training.roles import Role
from turbotrain.training.state import StateWriter, read_state, saved_steps


class TrainingDiverged(RuntimeError):
    """Too many bad steps in a row; the last good state is on disk."""


@dataclass(frozen=True)
class Term:
    """One loss of a step. lost: the share of its samples that teach nothing (a step that loses all is not taken)."""

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    lost: Tensor | float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a task wants done at one step: `role`'s network updated by the mean over the micro-batches of the sum of losses.

    terms: the losses of all micro-batches. Each is computed only when the graph of the one before it is gone. phase: equal
    for steps whose metrics measure the same. cuda_graph: records the gradients of such a step, and replays them.
    """

    role: str
    terms: Sequence[Callable[[], Term]]
    micro_batches: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    phase: str = ""
    cuda_graph: StepGraph | None = None


class Task(Protocol):
    @property
    def roles(self) -> Mapping[str, Role]: ...

    def plan(self, step: int, draw: int) -> Plan:
        """step: where training is. draw: which data and noise to take, equal to the step until a roll-back."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    title: str
    steps: int
    save_every: int
    sample_every: int
    max_bad_steps: int
    log_every: int
    keep_last: int
    keep_best: str = ""
    guard: GuardSection = field(default_factory=GuardSection)
    walltime_minutes: float = 0.0
    profile_steps: Sequence[int] = ()


@dataclass
class Progress:
    """Where a loop is: besides tensors, all that its states hold."""

    guard: Guard
    best: Best
    step: int = 0
    detours: int = 0

    def counters(self, roles: Mapping[str, Role]) -> dict[str, Any]:
        updates = {name: role.updates for name, role in roles.items()}
        return {
            "updates": updates,
            "detours": self.detours,
            "guard": self.guard.state(),
            "best": self.best.state(),
        }

    def restore(self, states: Path, task: Task) -> bool:
        """From the newest state; False and unchanged if there is none."""
        found = read_state(states, _pieces(task))
        if found is None:
            return False
        self.step, self.detours = found["step"], found["detours"]
        self.guard.load(found["guard"])
        self.best.load(found.get("best", {}), saved_steps(states), self.step)
        for name, role in task.roles.items():
            role.updates = found["updates"][name]
            role.restored()
        return True


def train(
    task: Task,
    settings: LoopSettings,
    folder: Path,
    accelerator: Accelerator,
    sample: Callable[[int], None] | None = None,
) -> None:
    """Run `settings.steps` steps of `task`, continuing from the newest state under `folder/state`, where the last one stays.

    Args:
        sample: called with the number of finished steps every `sample_every`.

    Raises:
        TrainingDiverged: `max_bad_steps` bad steps in a row (after as many roll-backs as allowed); the last good state is saved.
        Stopped: a signal or the walltime ended it; the state is saved.
    """
    states = folder / "state"
    writer = StateWriter(states, settings.keep_last)
    at = Progress(Guard(settings.guard), Best(settings.keep_best, settings.save_every))
    at.restore(states, task)
    bad, saved, save_asked = 0, at.step, False

    def save() -> None:
        nonlocal saved, save_asked
        save_asked = False
        if at.step != saved:
            at.best.judge(at.step)
            writer.save(at.step, _pieces(task), at.counters(task.roles))
            saved = at.step

    def settle() -> None:
        """Until the last state is on disk for everybody."""
        writer.wait()
        accelerator.wait_for_everyone()

    meter = Meter(accelerator.device)
    with (
        closing(writer),
        StageLog(folder, settings.title, settings.steps, at.step, settings.log_every, accelerator) as log,
        Interruption(settings.walltime_minutes) as interruption,
        profiled(folder / "profile", settings.profile_steps, accelerator) as profiler,
    ):
        while at.step < settings.steps:
            meter.start()
            plan = task.plan(at.step, at.step + at.detours * settings.steps)

            def asked() -> dict[str, float]:
                return {"stop": float(interruption.asks_to_stop()), "save": float(interruption.asks_to_save())}

            step = take_step(task, plan, at.guard, meter, accelerator, asked)
            objection, stop = step.objection, step.asked["stop"]
            save_asked = save_asked or step.asked["save"] > 0  # a bad step is not saved after, but the next good one is
            log.record(at.step, step.line)
            at.best.see(at.step, plan.phase, {} if objection else step.line)
            bad = bad + 1 if objection else 0
            at.step += 1
            profiler.step()
            if bad >= settings.max_bad_steps:
                at.step -= bad
                if at.detours >= settings.guard.rollbacks:
                    save()
                    settle()
                    raise TrainingDiverged(
                        f"{settings.title}: {bad} steps in a row without a finite loss or gradient within the guard's limits "
                        f"(step {at.step + bad - 1}: {objection}); the state after step {at.step} is kept in {states}. Lower "
                        "the learning rate or look at the data, then rerun to continue"
                    )
                settle()
                detours, bad = at.detours + 1, 0
                if at.restore(states, task):
                    saved = at.step
                at.detours = detours
                log.rewind(at.step, f"{objection}: back to the state after step {at.step}, with other data")
                continue
            if bad == 0 and (at.step % settings.save_every == 0 or at.step == settings.steps or stop or save_asked):
                save()
            if sample and settings.sample_every and at.step % settings.sample_every == 0:
                sample(at.step)
            if stop and bad == 0 and at.step < settings.steps:
                settle()
                raise Stopped(f"{settings.title}: stopped after step {at.step}, as asked; the same command continues")
        save()
        settle()


@dataclass(frozen=True)
class Step:
    """What became of a step.

    line: what metrics.jsonl says of it; objection: why it was not taken, empty if it was; asked: means over the processes.
    """

    line: dict[str, Any]
    objection: str
    asked: dict[str, float]


def take_step(
    task: Task,
    plan: Plan,
    guard: Guard,
    meter: Meter,
    accelerator: Accelerator,
    asked: Callable[[], Mapping[str, float]] = dict,
) -> Step:
    """Gradients of every term of `plan`, then the update unless the guard objects. `meter` was started before the plan was
    made; `asked` is called once, on every process, after the gradients."""
    role = task.roles[plan.role]
    if plan.cuda_graph is None:
        sums = _accumulate(role, plan, meter.before_last_backward)
    else:
        meter.before_last_backward()
        sums = plan.cuda_graph(role.parameters.values(), partial(_accumulate, role, plan))
    questions = asked()
    norm = role.norm()
    values = {**sums, **plan.metrics, **questions}
    means, times, norm_value = _over_ranks(accelerator, values, meter.own_times(), norm)
    answers = {name: means.pop(name) for name in questions}
    objection = guard.objection(plan.role, means["loss"], norm_value, means.pop("lost"))
    if objection:
        role.skip()
    else:
        role.step(norm)
    line = {"role": plan.role, **means, "grad_norm": norm_value, **meter.stop(times, plan.work)}
    return Step(line, objection, answers)


def _pieces(task: Task) -> list[Piece]:
    return [piece for role in task.roles.values() for piece in role.pieces()]


def _accumulate(role: Role, plan: Plan, before_last: Callable[[], None] = lambda: None) -> Sums:
    """Backward through every term in turn; returns the sums of losses and metrics, averaged over the micro-batches."""
    sums: Sums = {"loss": 0.0, "lost": 0.0}
    for index, term in enumerate(plan.terms):
        last = index == len(plan.terms) - 1
        with role.micro_step(last):
            out = term()
            if last:
                before_last()
            role.backward(out.loss / plan.micro_batches)
        for name, value in {"loss": out.loss.detach(), "lost": out.lost, **out.metrics}.items():
            sums[name] = sums.get(name, 0.0) + value / plan.micro_batches
    return sums


def _over_ranks(
    accelerator: Accelerator, values: Mapping[str, Tensor | float], times: Mapping[str, float], norm: Tensor
) -> tuple[dict[str, float], dict[str, list[float]], float]:
    """Means of `values` and each rank's `times`, by one collective and one wait for the device; the norm, which is the same
    everywhere, is the first rank's, so that all judge the step alike to the last bit."""
    flat = torch.stack(
        [
            torch.as_tensor(x, dtype=torch.float64, device=accelerator.device)
            for x in (*values.values(), *times.values(), norm)
        ]
    )
    every = flat[None]
    if accelerator.num_processes > 1:
        every = cast(Tensor, accelerator.gather(every))
    rows = every.T.tolist()
    means = {name: sum(row) / len(row) for name, row in zip(values, rows)}
    return means, dict(zip(times, rows[len(values) : -1])), rows[-1][0]
