"""rCM stage: distil the guided teacher into a student of 1 to 4 steps (method: rCM; arXiv 2510.08431).

Phases name what trains: a consistency term (scm or dcm), the score term (dmd), or both. With the score term a student update
comes every `student_update_freq` iterations and the critic trains on the others. The student's average is what is passed on.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from turbotrain.config import PhaseSection
from turbotrain.data.latents import Batch
from turbotrain.diffusion.guidance import guided, switch_experts
from turbotrain.diffusion.times import noise_trig, rf_to_trig
from turbotrain.diffusion.velocity import BoundVelocity, Velocity, bind
from turbotrain.losses import LossOutput, backward_simulation, boundary_consistency, critic, dcm, dmd, scm
from turbotrain.losses.consistency import TangentForm, TangentMethod
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.wan import WanTransformer
from turbotrain.stages.artifacts import (
    attention_config,
    sample_strips,
    sampler_settings,
    write_trained,
)
from turbotrain.stages.context import BatchSource, Passes, StageContext, draw_times
from turbotrain.stages.experts import grid_range, times_within
from turbotrain.stages.lora import after_sla, trainable
from turbotrain.training.ema import PowerEMA
from turbotrain.training.loop import Plan, Term, train
from turbotrain.training.meter import Work
from turbotrain.training.roles import AVERAGE
from turbotrain.training.seeding import StepRandom

SIMULATION_STEPS = 4


class RcmTask:
    def __init__(self, context: StageContext) -> None:
        section = context.config.rcm
        self.section = section
        self.within = context.time_range
        self.fixed_times = times_within(self.within, context.config.sampler.times)
        # A low-noise expert never sees noise alone: its passes all begin at a time of their own.
        self.from_latents = self.within[1] < 1
        is_fixed = section.simulation_times == "fixed"
        self.passes = len(self.fixed_times) + (not self.from_latents) if is_fixed else SIMULATION_STEPS
        self.boundary = context.variant.boundary
        self.guidance = context.guidance
        self.source = BatchSource(context, context.dataset, section.batch_size)
        self.teacher = context.teacher(section.teacher_attention)
        self.network = student_network(context)
        role = context.role("student", self.network, section.optim, section.steps)
        role.average = PowerEMA(role.weights(), section.ema_rate)
        self.roles = {"student": role}
        if any(phase.dmd for phase in section.phases):
            fake = trainable(context, "teacher")
            self.roles["critic"] = context.role("critic", fake, section.critic_optim, section.steps)
        # The high-noise expert's consistency ends where the low-noise one takes over: its student is the boundary condition.
        self.low = context.frozen("low") if "low" in context.inputs else None
        low = None if self.low is None else self.low.attention_config
        # Of the tangent, from 0 to 1. A tensor: what a CUDA graph reads.
        self.warmup = torch.zeros((), dtype=torch.float64, device=context.device)
        self.work = StepWork(context, self.network.attention_config, self.teacher.attention_config, low, self.passes)

    def plan(self, step: int, draw: int) -> Plan:
        """One loss at a time: the consistency term's graph is gone when the score term's begins."""
        phase, dmd_step = self._phase(step)
        losses = self._losses(phase, step)
        parts = self.source.at(draw)
        self.warmup.fill_(min(1.0, step / self.section.tangent_warmup) if self.section.tangent_warmup else 1.0)
        if dmd_step is not None and (dmd_step + 1) % self.section.student_update_freq:
            terms = [partial(self._critic_term, *part) for part in parts]
            graph = self.source.cuda_graph("critic", self._renoisings("critic"))
            return Plan("critic", terms, len(parts), self.source.reader.metrics, self.work.critic(), losses, graph)
        terms = []
        for part in parts:
            if phase.cm != "none":
                terms.append(partial(self._consistency_term, phase, *part))
            if phase.cm == "scm" and self.low is not None:
                terms.append(partial(self._boundary_term, *part))
            if dmd_step is not None:
                terms.append(partial(self._score_term, *part))
        work = self.work.student(phase.cm, dmd_step is not None)
        simulated = () if dmd_step is None else (self._renoisings("student"),)
        graph = self.source.cuda_graph("student", phase.cm, *simulated)
        return Plan("student", terms, len(parts), self.source.reader.metrics, work, losses, graph)

    def _consistency_term(self, phase: PhaseSection, batch: Batch, random: StepRandom) -> Term:
        out = self._consistency_loss(phase, batch, random, self._student(batch))
        # With every sample dropped nothing is learnt: a bad step, not one whose loss happens to be zero.
        lost = out.metrics["dropped"] / len(batch.prompts) if "dropped" in out.metrics else 0.0
        return Term(out.loss, {phase.cm: out.loss.detach(), **out.metrics}, lost)

    def _boundary_term(self, batch: Batch, random: StepRandom) -> Term:
        assert self.low is not None
        assert self.boundary is not None
        x0 = batch.latent_BCTHW
        out = boundary_consistency(
            self._student(batch),
            _bound(self.low, batch),
            x0,
            random.normal("boundary_noise", x0.shape[1:]),
            self.boundary,
            loss_scale=self.section.loss_scale,
            mask=batch.loss_mask,
        )
        return Term(out.loss, {"boundary": out.loss.detach()})

    def _score_term(self, batch: Batch, random: StepRandom) -> Term:
        out = self._score_loss(batch, random, self._student(batch))
        return Term(out.loss, {"dmd": out.loss.detach(), **out.metrics})

    def _critic_term(self, batch: Batch, random: StepRandom) -> Term:
        out = self._critic_loss(batch, random, _bound(self.roles["student"].network, batch))
        return Term(out.loss, {"critic": out.loss.detach()})

    def _phase(self, step: int) -> tuple[PhaseSection, int | None]:
        """The phase of a step, and how many steps its score term has run (None: not in this step)."""
        begin = 0
        for phase in self.section.phases:
            if step < begin + phase.steps:
                # Warm-up is for the consistency term's tangent; without that term there is nothing to warm up.
                first = max(begin, self.section.tangent_warmup) if phase.cm == "scm" else begin
                return phase, step - first if phase.dmd and step >= first else None
            begin += phase.steps
        raise IndexError(f"rcm: step {step} lies after the last phase ({begin} steps)")

    def _losses(self, phase: PhaseSection, step: int) -> str:
        """Steps whose metrics `launch.keep_best` may compare: those of one phase, its warm-up apart."""
        warming = phase.cm == "scm" and step < self.section.tangent_warmup
        return f"{self.section.phases.index(phase)}{' warm-up' * warming}"

    def _student(self, batch: Batch) -> Velocity:
        return _bound(self.roles["student"].module, batch)

    def _teacher(self, batch: Batch) -> Velocity:
        negative_BLD = self.source.dataset.negative_LD.float().expand_as(batch.embed_BLD)
        negative = bind(self.teacher, negative_BLD, **batch.conditioning.arguments)
        return guided(_bound(self.teacher, batch), negative, self.guidance)

    def _consistency_loss(self, phase: PhaseSection, batch: Batch, random: StepRandom, student: Velocity) -> LossOutput:
        section = self.section
        x0 = batch.latent_BCTHW
        noise = random.normal("noise", x0.shape[1:])
        if phase.cm == "dcm":
            grid = grid_range(self.within, section.dcm_grid, section.dcm_shift)
            index = grid.start + (random.uniform("dcm_index") * len(grid)).long()
            return dcm(
                student,
                self._teacher(batch),
                x0,
                noise,
                index,
                random.uniform("dcm_offset"),
                steps=section.dcm_grid,
                shift=section.dcm_shift,
                loss_scale=section.loss_scale,
                target=self._both(student, batch),
                mask=batch.loss_mask,
            )
        return scm(
            student,
            self._teacher(batch),
            x0,
            noise,
            rf_to_trig(draw_times(section.times_cm, random, "times_cm", self.within)),
            self.warmup,
            tangent=cast(TangentMethod, section.tangent),
            form=cast(TangentForm, section.tangent_form),
            loss_scale=section.loss_scale,
            mask=batch.loss_mask,
        )

    def _both(self, student: Velocity, batch: Batch) -> Velocity:
        """Who answers at the later point of a step: the student, below the boundary the low-noise expert's."""
        if self.low is None or self.boundary is None:
            return student
        together = self.roles["student"].needs_all_ranks
        return switch_experts(student, _bound(self.low, batch), self.boundary, together)

    def _renoisings(self, role: str) -> int:
        """How often the next simulated sample is made noisy again: of a network's updates, one after the other."""
        return self.roles[role].updates % self.passes

    def _simulate(self, batch: Batch, random: StepRandom, student: Velocity, again: int) -> Tensor:
        """What the student makes of noise. A low-noise expert never sees noise alone: it begins with clean latents made noisy
        at a time of its own, as the high-noise expert hands its result over."""
        shape = batch.latent_shape
        draws = [self._simulation_time(i, batch, random) for i in range(again + self.from_latents)]
        noises = [random.normal(f"simulation_noise_{i}", shape) for i in range(again)]
        start = random.normal("simulation_start", shape)
        if self.from_latents:
            first, *draws = draws
            start = noise_trig(batch.latent_BCTHW, start, first)
            generated = backward_simulation(student, start, draws, noises, first)
        else:
            generated = backward_simulation(student, start, draws, noises)
        return batch.conditioning.restore(generated)

    def _simulation_time(self, i: int, batch: Batch, random: StepRandom) -> Tensor:
        if self.section.simulation_times == "fixed":
            return batch.embed_BLD.new_full((len(batch.prompts),), self.fixed_times[i], dtype=torch.float64)
        return rf_to_trig(draw_times(self.section.times_dmd, random, f"simulation_time_{i}", self.within))

    def _score_loss(self, batch: Batch, random: StepRandom, student: Velocity) -> LossOutput:
        generated = self._simulate(batch, random, student, self._renoisings("student"))
        noise = random.normal("score_noise", generated.shape[1:])
        t = rf_to_trig(draw_times(self.section.times_dmd, random, "times_dmd", self.within))
        fake = _bound(self.roles["critic"].network, batch)
        scale = self.section.dmd_loss_scale
        return dmd(generated, self._teacher(batch), fake, noise, t, loss_scale=scale, mask=batch.loss_mask)

    def _critic_loss(self, batch: Batch, random: StepRandom, student: Velocity) -> LossOutput:
        with torch.no_grad():
            generated = self._simulate(batch, random, student, self._renoisings("critic"))
        noise = random.normal("score_noise", generated.shape[1:])
        t = rf_to_trig(draw_times(self.section.times_dmd, random, "times_dmd", self.within))
        return critic(_bound(self.roles["critic"].module, batch), generated, noise, t, mask=batch.loss_mask)


class StepWork:
    """What each kind of step has to do. The teacher answers twice, with and without the prompt; a discrete step asks the student
    twice; of `passes` for a simulated sample all numbers come in turn. low: of the low-noise expert's student, where it is the
    continuous term's boundary condition."""

    def __init__(
        self,
        context: StageContext,
        attention: AttentionConfig,
        teacher: AttentionConfig,
        low: AttentionConfig | None = None,
        passes: int = SIMULATION_STEPS,
    ) -> None:
        self.context, self.attention, self.of_teacher, self.low = context, attention, teacher, low
        self.teacher = 1.0 if context.guidance == 1 else 2.0
        self.simulated = (passes - 1) / 2  # before the last

    def student(self, cm: str, dmd: bool) -> Work:
        forward = {"scm": 1.0, "dcm": 2.0, "none": 0.0}[cm] + (1.0 + self.simulated if dmd else 0.0)
        losses = (cm != "none") + dmd
        boundary = 0.0 if self.low is None or cm != "scm" else 1.0
        return self._work(
            Passes(self.attention, forward + boundary, losses + boundary, tangents=float(cm == "scm")),
            Passes(self.of_teacher, self.teacher * losses, trained=False),
            Passes(AttentionConfig(), float(dmd)),
            Passes(self.low or AttentionConfig(), boundary, trained=False),
        )

    def critic(self) -> Work:
        return self._work(Passes(self.attention, 1.0 + self.simulated), Passes(AttentionConfig(), 1.0, 1.0))

    def _work(self, *passes: Passes) -> Work:
        return self.context.work(self.context.config.rcm.batch_size, *passes)


def _bound(network: nn.Module, batch: Batch) -> BoundVelocity:
    """A network with the text and the image of a batch."""
    return bind(network, batch.embed_BLD, **batch.conditioning.arguments)


def student_network(context: StageContext) -> WanTransformer:
    """sequential: the SLA stage's network. joint: the teacher with SLA whose projection starts at zero. merge: the dense
    teacher; SLA's weights are added afterwards."""
    if "sla" in context.inputs:
        return after_sla(context)
    attention = None if context.config.rcm.composition == "merge" else attention_config(context.config)
    return trainable(context, "teacher", attention)


def run(context: StageContext) -> dict[str, object]:
    task = RcmTask(context)
    settings = context.loop_settings(context.config.rcm)
    train(task, settings, context.folder, context.accelerator, sample_strips(context, task.network, mode="turbo"))
    if context.accelerator.is_main_process:
        write_trained(context, AVERAGE, task.network, sampler_settings(context.config))
    return {"updates": {name: role.updates for name, role in task.roles.items()}}
