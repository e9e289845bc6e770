"""Evaluate stage: every result of the run on the same held-out prompts and seeds, judged alike.

Rows: the teacher (guided, many steps) and the SLA model in the teacher's sampler; the undistilled teacher and SLA model in the
Turbo sampler, so that distillation is seen to do something; the distilled model and its W8A8 form.
"""

from __future__ import annotations

from typing import Any

import torch

from turbotrain.checkpoint import CheckpointMeta, load_transformer, read_meta
from turbotrain.data.shapes import sample_clips
from turbotrain.evaluation import judge as shapes_judge
from turbotrain.evaluation.evaluate import Row, evaluate
from turbotrain.stages.artifacts import make_pipeline, sampler_settings
from turbotrain.stages.context import StageContext


def run(context: StageContext) -> dict[str, object]:
    section, data = context.config.evaluate, context.config.data
    if context.variant.vae != "shapes":
        raise ValueError(
            f"model.variant={context.variant.name!r}: the evaluate stage judges the shapes world; leave evaluate out of stages "
            "and sample with infer.py"
        )
    clips = sample_clips(section.prompts, context.config.seed, split="test")
    rows = _rows(context)
    network = rows[0].networks
    assert network is not None
    result = evaluate(
        make_pipeline(context, network[0]),  # type: ignore[arg-type]  # a WanTransformer
        rows,
        [clip.caption for clip in clips],
        [context.config.seed + index for index in range(len(clips))],
        judge=shapes_judge,
        batch_size=section.batch_size,
        clips=section.strips,
        latency_repeats=section.latency_repeats,
        progress=context.say,
        width=data.width,
        height=data.height,
        frames=data.frames,
    )
    result.save(context.folder)
    return {"rows": len(rows), "prompts": len(clips)}


def _rows(context: StageContext) -> list[Row]:
    section, sampler = context.config.evaluate, context.config.sampler
    teacher = sampler.teacher
    guided: dict[str, Any] = {
        "guidance": teacher.guidance,
        "shift": teacher.shift,
        "solver": teacher.solver,
        "grid": teacher.grid,
    }
    turbo = CheckpointMeta(sampler=sampler_settings(context.config))
    rows = []
    for role in ("teacher", "sla"):
        if role not in context.inputs:
            continue
        network = [load_transformer(context.inputs[role], device=context.device, dtype=torch.float32)]
        rows.append(Row(role, "teacher", teacher.steps, network, settings=guided))
        if section.undistilled:
            rows += [Row(role, "turbo", steps, network, turbo) for steps in section.turbo_steps]
    distilled = "merge" if "merge" in context.inputs else "rcm"
    for role, model in ((distilled, "rcm"), ("quantize", "turbo")):
        if role not in context.inputs:
            continue
        meta = read_meta(context.inputs[role])
        network = [load_transformer(context.inputs[role], device=context.device)]
        rows += [Row(model, "turbo", steps, network, meta) for steps in section.turbo_steps]
    return rows
