"""Top-k by layer, chosen before SLA trains: a mean top-k is shared out by the attention mass that each layer would keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, reduce
from torch import nn

from turbotrain.diffusion.times import noise_rf, rf_to_timestep
from turbotrain.diffusion.velocity import bind
from turbotrain.evaluation.attention_mass import attention_mass, share_out
from turbotrain.model.attention_config import LAYER_TOPKS, AttentionConfig
from turbotrain.model.wan import WanTransformer
from turbotrain.records import write_json
from turbotrain.stages.context import BatchSource, StageContext, draw_times

CHOICE_FILE = "layer_topk.json"
MEASURED_STEPS = 4  # of training, whose batches the teacher is watched on


def within_budget(
    context: StageContext, source: BatchSource, teacher: WanTransformer, attention: AttentionConfig
) -> AttentionConfig:
    """`attention` with a top-k for every layer, of mean at most `sla.layer_budget`; the same on every process, and the same
    again when the stage continues, on whatever processes: the choice and what led to it stay in the stage's folder.

    The teacher is watched on the first batches of training, noised as training noises them. Every process takes part.
    """
    path = context.folder / CHOICE_FILE
    # The first process decides for all: the file may appear while another looks for it.
    found: list[Any] = [
        json.loads(path.read_text()) if context.accelerator.is_main_process and path.is_file() else None
    ]
    broadcast_object_list(found)
    if found[0] is None:
        mass_LK = _mass(context, source, teacher, attention)
        if context.accelerator.is_main_process:
            budget = context.config.sla.layer_budget
            chosen = share_out([[layer] for layer in mass_LK], LAYER_TOPKS, budget)
            choice = {"layer_budget": budget, "layer_topk": chosen, "topk": list(LAYER_TOPKS), "mass": mass_LK}
            write_json(path, choice)
            context.say(f"top-k by layer: {', '.join(map(str, chosen))}")
            found = [choice]
        broadcast_object_list(found)
    choice = found[0]
    assert choice is not None
    return AttentionConfig.from_dict({"layer_topk": choice["layer_topk"]}, attention)


def _mass(
    context: StageContext, source: BatchSource, teacher: WanTransformer, attention: AttentionConfig
) -> list[list[float]]:
    """Softmax mass by layer and top-k of LAYER_TOPKS: the mean over heads, and over all processes' samples."""
    masses = attention_mass(teacher, _calls(context, source), LAYER_TOPKS, attention)
    # A context group deals the heads out, so that this is the mean over all of them too.
    mean_LK = torch.tensor(masses, dtype=torch.float32, device=context.device).mean(1)
    mean_LK = reduce(mean_LK, "mean")
    assert isinstance(mean_LK, torch.Tensor)
    return mean_LK.tolist()


def _calls(context: StageContext, source: BatchSource) -> Iterator[Callable[[nn.Module], Any]]:
    section = context.config.sla
    for step in range(MEASURED_STEPS):
        for batch, random in source.at(step):
            x0_BCTHW = batch.latent_BCTHW
            s_B = draw_times(section.times, random, "times", context.time_range)
            x_BCTHW = noise_rf(x0_BCTHW, random.normal("noise", x0_BCTHW.shape[1:]), s_B)
            yield partial(_ask, x_BCTHW, rf_to_timestep(s_B), batch.embed_BLD, batch.conditioning.arguments)


def _ask(
    x_BCTHW: torch.Tensor, timestep_B: torch.Tensor, text_BLD: torch.Tensor, given: dict[str, Any], network: nn.Module
) -> None:
    bind(network, text_BLD, **given)(x_BCTHW, timestep_B)
