"""Teacher stage: flow matching, from scratch or from a checkpoint (`model.teacher`). What is passed on is the average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from turbotrain.diffusion.velocity import bind
from turbotrain.losses import flow_matching
from turbotrain.model.wan import WanTransformer
from turbotrain.stages.artifacts import sample_strips, write_model
from turbotrain.stages.context import BatchSource, StageContext, draw_times, drop_captions
from turbotrain.training.ema import PowerEMA
from turbotrain.training.loop import StepLoss, train
from turbotrain.training.parallel import Role, capture, make_role
from turbotrain.training.seeding import derive_seed


class TeacherTask:
    def __init__(self, context: StageContext) -> None:
        section = context.config.teacher
        self.section = section
        self.source = BatchSource(context, context.dataset(), section.batch_size)
        self.network = initial_network(context)
        if section.cuda_graph and context.device.type == "cuda":
            batch, _ = self.source.at(0)
            times = torch.zeros(len(batch.prompts), dtype=torch.float64, device=context.device)
            inputs = (batch.latent_BCTHW, times, batch.embed_BLD)
            capture(self.network.to(context.device), inputs, context.accelerator)
        role = make_role(
            context.accelerator, "teacher", self.network, section.optim, section.steps, context.checkpointing
        )
        self.roles = {"teacher": role}
        self.average = PowerEMA(self.network, rate=section.ema_rate)

    def loss(self, step: int) -> StepLoss:
        batch, random = self.source.at(step)
        noise = random.normal("noise", batch.latent_BCTHW.shape[1:])
        s = draw_times(self.section.times, random, "times")
        text = drop_captions(batch, self.source.dataset.negative_LD, self.section.caption_dropout, random)
        out = flow_matching(bind(self.roles["teacher"].module, text), batch.latent_BCTHW, noise, s)
        return StepLoss("teacher", out.loss, {**out.metrics, **self.source.reader.metrics})

    def updated(self, role: Role) -> None:
        self.average.update(role.network, role.updates)

    def extra_state(self) -> dict[str, Tensor]:
        return self.average.state_dict()

    def load_extra_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.average.load_state_dict(tensors)


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
        write_model(context, task.average.network_state(), task.network)
    return {"parameters": sum(p.numel() for p in task.network.parameters())}
