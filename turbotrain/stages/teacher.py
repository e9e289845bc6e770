"""Teacher stage: flow matching, from scratch or from a checkpoint (`model.teacher`). What is passed on is the average."""

from __future__ import annotations

import torch

from turbotrain.data.latents import Batch
from turbotrain.diffusion.velocity import bind
from turbotrain.losses import flow_matching
from turbotrain.model.wan import WanTransformer
from turbotrain.stages.artifacts import sample_strips, write_trained
from turbotrain.stages.context import BatchSource, Passes, StageContext, draw_times, drop_captions
from turbotrain.training.ema import PowerEMA
from turbotrain.training.loop import Plan, Term, train
from turbotrain.training.roles import AVERAGE
from turbotrain.training.seeding import StepRandom, derive_seed


class TeacherTask:
    def __init__(self, context: StageContext) -> None:
        section = context.config.teacher
        self.section = section
        self.within = context.time_range
        self.source = BatchSource(context, context.dataset, section.batch_size)
        self.network = initial_network(context)
        role = context.role("teacher", self.network, section.optim, section.steps)
        role.average = PowerEMA(role.weights(), section.ema_rate)
        self.roles = {"teacher": role}
        self.work = context.work(section.batch_size, Passes(self.network.attention_config, 1.0, 1.0))

    def plan(self, step: int, draw: int) -> Plan:
        return self.source.plan(draw, "teacher", self._loss, self.work)

    def _loss(self, batch: Batch, random: StepRandom) -> Term:
        noise = random.normal("noise", batch.latent_BCTHW.shape[1:])
        s = draw_times(self.section.times, random, "times", self.within)
        text = drop_captions(batch, self.source.dataset.negative_LD, self.section.caption_dropout, random)
        velocity = bind(self.roles["teacher"].module, text, **batch.conditioning.arguments)
        out = flow_matching(velocity, batch.latent_BCTHW, noise, s, batch.loss_mask)
        return Term(out.loss, out.metrics)


def initial_network(context: StageContext) -> WanTransformer:
    """The network to train: `model.teacher` if the recipe names one, else the variant at random."""
    if "teacher" in context.inputs:
        return context.load("teacher")
    torch.manual_seed(derive_seed(context.seed, "initial weights"))
    return WanTransformer(context.variant.config)


def run(context: StageContext) -> dict[str, object]:
    task = TeacherTask(context)
    settings = context.loop_settings(context.config.teacher)
    train(task, settings, context.folder, context.accelerator, sample_strips(context, task.network, mode="teacher"))
    if context.accelerator.is_main_process:
        write_trained(context, AVERAGE, task.network)
    return {"parameters": sum(p.numel() for p in task.network.parameters())}
