"""Merge stage: W = W_rcm + w (W_sla - W_teacher), the projections of SLA's linear branch from SLA (method: composing)."""

from __future__ import annotations

import torch

from turbotrain.checkpoint.merge import merge_keys, merge_tensor
from turbotrain.stages.artifacts import sampler_settings, write_model
from turbotrain.stages.context import StageContext
from turbotrain.training.bring import bring


def run(context: StageContext) -> dict[str, object]:
    teacher, sla, rcm = (context.load(role) for role in ("teacher", "sla", "rcm"))
    for network in (teacher, sla, rcm):
        bring(network, torch.device("cpu"))
    before, trained, distilled = teacher.state_dict(), sla.state_dict(), rcm.state_dict()
    weight = context.config.merge.weight
    keys = merge_keys(distilled, trained, before)
    merged = {key: merge_tensor(distilled[key], trained[key], before[key], weight) for key in keys.merged}
    merged.update({key: trained[key] for key in keys.added})
    merged.update({key: distilled[key] for key in keys.kept})
    rcm.set_attention(sla.attention_config)  # what its P was trained with
    write_model(context, merged, rcm, sampler=sampler_settings(context.config))
    return {"weight": weight, "merged": len(keys.merged), "from_sla": len(keys.added)}
