"""SLA stage: the teacher's weights with sparse-linear attention, trained back to the teacher's velocity (method: SLA).

White-box (default): match the dense teacher's velocity at equal inputs, conditional branch only. Black-box: flow matching.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from turbotrain.diffusion.velocity import bind
from turbotrain.losses import flow_matching, sla_alignment
from turbotrain.stages.artifacts import attention_config, sample_strips, write_model
from turbotrain.stages.context import BatchSource, StageContext, draw_times, drop_captions
from turbotrain.training.loop import StepLoss, train
from turbotrain.training.parallel import Role, make_role


class SlaTask:
    def __init__(self, context: StageContext) -> None:
        section = context.config.sla
        self.section = section
        self.source = BatchSource(context, context.dataset(), section.batch_size)
        self.network = context.load("teacher")
        self.network.set_attention(attention_config(context.config))
        self.teacher = context.load("teacher", context.device)
        self.teacher.requires_grad_(False)
        self.roles = {
            "student": make_role(
                context.accelerator, "student", self.network, section.optim, section.steps, context.checkpointing
            )
        }

    def loss(self, step: int) -> StepLoss:
        batch, random = self.source.at(step)
        x0 = batch.latent_BCTHW
        noise = random.normal("noise", x0.shape[1:])
        s = draw_times(self.section.times, random, "times")
        text = drop_captions(batch, self.source.dataset.negative_LD, self.section.caption_dropout, random)
        student = bind(self.roles["student"].module, text)
        if self.section.objective == "white_box":
            out = sla_alignment(student, bind(self.teacher, text), x0, noise, s)
        else:
            out = flow_matching(student, x0, noise, s)
        return StepLoss("student", out.loss, {**out.metrics, **self.source.reader.metrics})

    def updated(self, role: Role) -> None:
        """SLA training keeps no average: its loss is a regression with a fixed target."""

    def extra_state(self) -> dict[str, Tensor]:
        return {}

    def load_extra_state(self, tensors: Mapping[str, Tensor]) -> None:
        pass


def run(context: StageContext) -> dict[str, object]:
    task = SlaTask(context)
    settings = context.loop_settings(context.config.sla)
    train(task, settings, context.folder, context.accelerator, sample_strips(context, task.network, mode="teacher"))
    if context.accelerator.is_main_process:
        write_model(context, task.network.state_dict(), task.network)
    return {}
