"""SLA stage: the teacher's weights with sparse-linear attention, trained back to the teacher's velocity (method: SLA).

White-box (default): match the dense teacher's velocity at equal inputs, conditional branch only. Black-box: flow matching.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from turbotrain.data.latents import Batch
from turbotrain.diffusion.velocity import bind
from turbotrain.losses import flow_matching, sla_alignment
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.wan import WanTransformer
from turbotrain.stages.artifacts import attention_config, sample_strips, write_trained
from turbotrain.stages.context import BatchSource, Passes, StageContext, draw_times, drop_captions
from turbotrain.stages.layer_budget import within_budget
from turbotrain.stages.lora import trainable
from turbotrain.training.loop import Plan, Term, train
from turbotrain.training.seeding import StepRandom


class SlaTask:
    def __init__(self, context: StageContext) -> None:
        section = context.config.sla
        self.section = section
        self.within = context.time_range
        self.source = BatchSource(context, context.dataset, section.batch_size)
        self.teacher = context.teacher()
        attention = attention_config(context.config)
        if section.layer_budget:
            attention = within_budget(context, self.source, self.teacher, attention)
        self.network = trainable(context, "teacher", attention)
        # Without an average: the loss is a regression with a fixed target.
        self.roles = {"student": context.role("student", self.network, section.optim, section.steps)}
        if not section.linear_branch:
            _hold_at_zero(self.network)
        asked_teacher = 1.0 if section.objective == "white_box" else 0.0
        self.work = context.work(
            section.batch_size,
            Passes(self.network.attention_config, 1.0, 1.0),
            Passes(AttentionConfig(), asked_teacher, trained=False),
        )

    def plan(self, step: int, draw: int) -> Plan:
        return self.source.plan(draw, "student", self._loss, self.work)

    def _loss(self, batch: Batch, random: StepRandom) -> Term:
        x0 = batch.latent_BCTHW
        noise = random.normal("noise", x0.shape[1:])
        s = draw_times(self.section.times, random, "times", self.within)
        text = drop_captions(batch, self.source.dataset.negative_LD, self.section.caption_dropout, random)
        given = batch.conditioning.arguments
        student = bind(self.roles["student"].module, text, **given)
        if self.section.objective == "white_box":
            out = sla_alignment(student, bind(self.teacher, text, **given), x0, noise, s, batch.loss_mask)
        else:
            out = flow_matching(student, x0, noise, s, batch.loss_mask)
        return Term(out.loss, out.metrics)


def _hold_at_zero(network: WanTransformer) -> None:
    """The linear branch contributes nothing and learns nothing; the optimiser still sees its projections, as zeros. Of a
    network that a role has wrapped: FSDP2 computes with other tensors than those it keeps, which get the reduced gradient."""
    for block in network.blocks:
        for parameter in block.get_submodule("self_attn.attn_op.local_attn").parameters():
            if isinstance(parameter, DTensor):
                parameter.register_post_accumulate_grad_hook(_forget)
            elif parameter.requires_grad:
                parameter.register_hook(torch.zeros_like)


def _forget(parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.zero_()


def run(context: StageContext) -> dict[str, object]:
    task = SlaTask(context)
    settings = context.loop_settings(context.config.sla)
    train(task, settings, context.folder, context.accelerator, sample_strips(context, task.network, mode="teacher"))
    if context.accelerator.is_main_process:
        write_trained(context, "student/weight/", task.network)
    return {}
