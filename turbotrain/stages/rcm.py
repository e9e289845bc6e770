"""rCM stage: distil the guided teacher into a student of 1 to 4 steps (method: rCM; arXiv 2510.08431).

Phases name what trains: a consistency term (scm or dcm), the score term (dmd), or both. With the score term a student update
comes every `student_update_freq` iterations and the critic trains on the others. The student's average is what is passed on.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor

from turbotrain.config import PhaseSection
from turbotrain.data.latents import Batch
from turbotrain.diffusion.guidance import guided
from turbotrain.diffusion.times import rf_to_trig
from turbotrain.diffusion.velocity import Velocity, bind
from turbotrain.losses import LossOutput, backward_simulation, critic, dcm, dmd, scm
from turbotrain.losses.consistency import TangentForm, TangentMethod
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.wan import WanTransformer
from turbotrain.stages.artifacts import (
    attention_config,
    sample_strips,
    sampler_settings,
    write_model,
)
from turbotrain.stages.context import BatchSource, StageContext, draw_times
from turbotrain.training.ema import PowerEMA
from turbotrain.training.loop import Plan, Term, train
from turbotrain.training.meter import Work
from turbotrain.training.pieces import Piece, beside
from turbotrain.training.roles import Role
from turbotrain.training.seeding import StepRandom
from turbotrain.training.state import saved_tensors

SIMULATION_STEPS = 4


class RcmTask:
    def __init__(self, context: StageContext) -> None:
        section = context.config.rcm
        self.section = section
        self.sampler = context.config.sampler
        self.source = BatchSource(context, context.dataset(), section.batch_size)
        self.teacher = context.frozen("teacher")
        self.network = student_network(context)
        self.roles = {"student": context.role("student", self.network, section.optim, section.steps)}
        self.average = PowerEMA(self.roles["student"].weights(), rate=section.ema_rate)
        if any(phase.dmd for phase in section.phases):
            fake = context.load("teacher")
            self.roles["critic"] = context.role("critic", fake, section.critic_optim, section.steps)
        self.work = StepWork(context, self.network.attention_config)

    def plan(self, step: int, draw: int) -> Plan:
        """One loss at a time: the consistency term's graph is gone when the score term's begins."""
        phase, dmd_step = self._phase(step)
        parts = self.source.at(draw)
        if dmd_step is not None and (dmd_step + 1) % self.section.student_update_freq:
            terms = [partial(self._critic_term, *part) for part in parts]
            return Plan("critic", terms, len(parts), self.source.reader.metrics, self.work.critic())
        terms = []
        for part in parts:
            if phase.cm != "none":
                terms.append(partial(self._consistency_term, phase, step, *part))
            if dmd_step is not None:
                terms.append(partial(self._score_term, *part))
        work = self.work.student(phase.cm, dmd_step is not None)
        return Plan("student", terms, len(parts), self.source.reader.metrics, work)

    def _consistency_term(self, phase: PhaseSection, step: int, batch: Batch, random: StepRandom) -> Term:
        out = self._consistency_loss(phase, step, batch, random, bind(self.roles["student"].module, batch.embed_BLD))
        # With every sample dropped nothing is learnt: a bad step, not one whose loss happens to be zero.
        lost = out.metrics["dropped"] / len(batch.prompts) if "dropped" in out.metrics else 0.0
        return Term(out.loss, {phase.cm: out.loss.detach(), **out.metrics}, lost)

    def _score_term(self, batch: Batch, random: StepRandom) -> Term:
        out = self._score_loss(batch, random, bind(self.roles["student"].module, batch.embed_BLD))
        return Term(out.loss, {"dmd": out.loss.detach(), **out.metrics})

    def _critic_term(self, batch: Batch, random: StepRandom) -> Term:
        out = self._critic_loss(batch, random, bind(self.roles["student"].network, batch.embed_BLD))
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

    def _teacher(self, batch: Batch) -> Velocity:
        negative_BLD = self.source.dataset.negative_LD.float().expand_as(batch.embed_BLD)
        return guided(bind(self.teacher, batch.embed_BLD), bind(self.teacher, negative_BLD), self.section.guidance)

    def _consistency_loss(
        self, phase: PhaseSection, step: int, batch: Batch, random: StepRandom, student: Velocity
    ) -> LossOutput:
        section = self.section
        x0 = batch.latent_BCTHW
        noise = random.normal("noise", x0.shape[1:])
        if phase.cm == "dcm":
            index = (random.uniform("dcm_index") * section.dcm_grid).long()
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
            )
        warmup = section.tangent_warmup
        return scm(
            student,
            self._teacher(batch),
            x0,
            noise,
            rf_to_trig(draw_times(section.times_cm, random, "times_cm")),
            min(1.0, step / warmup) if warmup else 1.0,
            tangent=cast(TangentMethod, section.tangent),
            form=cast(TangentForm, section.tangent_form),
            loss_scale=section.loss_scale,
        )

    def _simulate(self, batch: Batch, random: StepRandom, student: Velocity, updates: int) -> Tensor:
        shape = batch.latent_BCTHW.shape[1:]
        again = updates % SIMULATION_STEPS
        if self.section.simulation_times == "fixed":
            fixed = batch.latent_BCTHW.new_tensor(self.sampler.times, dtype=torch.float64)
            draws = [fixed[i].expand(len(batch.prompts)) for i in range(again)]
        else:
            draws = [
                rf_to_trig(draw_times(self.section.times_dmd, random, f"simulation_time_{i}")) for i in range(again)
            ]
        noises = [random.normal(f"simulation_noise_{i}", shape) for i in range(again)]
        return backward_simulation(student, random.normal("simulation_start", shape), draws, noises)

    def _score_loss(self, batch: Batch, random: StepRandom, student: Velocity) -> LossOutput:
        generated = self._simulate(batch, random, student, self.roles["student"].updates)
        noise = random.normal("score_noise", generated.shape[1:])
        t = rf_to_trig(draw_times(self.section.times_dmd, random, "times_dmd"))
        fake = bind(self.roles["critic"].network, batch.embed_BLD)
        return dmd(generated, self._teacher(batch), fake, noise, t, loss_scale=self.section.dmd_loss_scale)

    def _critic_loss(self, batch: Batch, random: StepRandom, student: Velocity) -> LossOutput:
        with torch.no_grad():
            generated = self._simulate(batch, random, student, self.roles["critic"].updates)
        noise = random.normal("score_noise", generated.shape[1:])
        t = rf_to_trig(draw_times(self.section.times_dmd, random, "times_dmd"))
        return critic(bind(self.roles["critic"].module, batch.embed_BLD), generated, noise, t)

    def updated(self, role: Role) -> None:
        if role.name == "student":
            self.average.update(role.weights(), role.updates)

    def extra_pieces(self) -> list[Piece]:
        return beside("average/", self.average.shadow, self.roles["student"].held())


class StepWork:
    """What each kind of step has to do, in forward passes (forward and backward: three). The teacher answers twice, with and
    without the prompt; the student's tangent costs one pass more; simulated samples take 0 to 3 passes before the last."""

    def __init__(self, context: StageContext, attention: AttentionConfig) -> None:
        self.context, self.attention = context, attention
        self.teacher = 1.0 if context.config.rcm.guidance == 1 else 2.0

    def student(self, cm: str, dmd: bool) -> Work:
        passes = {"scm": 4.0, "dcm": 4.0, "none": 0.0}[cm]
        dense = self.teacher if cm != "none" else 0.0
        if dmd:
            passes += 3.0 + (SIMULATION_STEPS - 1) / 2
            dense += self.teacher + 1.0
        return self._work(passes, dense)

    def critic(self) -> Work:
        return self._work(1.0 + (SIMULATION_STEPS - 1) / 2, 3.0)

    def _work(self, student: float, dense: float) -> Work:
        passes = {AttentionConfig(): dense}
        passes[self.attention] = passes.get(self.attention, 0.0) + student
        return self.context.work(self.context.config.rcm.batch_size, passes)


def student_network(context: StageContext) -> WanTransformer:
    """sequential: the SLA stage's network. joint: the teacher with SLA whose projection starts at zero. merge: the dense
    teacher; SLA's weights are added afterwards."""
    if "sla" in context.inputs:
        return context.load("sla")
    network = context.load("teacher")
    if context.config.rcm.composition != "merge":
        network.set_attention(attention_config(context.config))
    return network


def run(context: StageContext) -> dict[str, object]:
    task = RcmTask(context)
    settings = context.loop_settings(context.config.rcm)
    train(task, settings, context.folder, context.accelerator, sample_strips(context, task.network, mode="turbo"))
    if context.accelerator.is_main_process:
        average = saved_tensors(context.folder / "state", "average/")
        write_model(context, average, task.network, sampler=sampler_settings(context.config))
    return {"updates": {name: role.updates for name, role in task.roles.items()}}
