"""Merge stage: W = W_rcm + w (W_sla - W_teacher), the projections of SLA's linear branch from SLA (method: composing)."""

from __future__ import annotations

from turbotrain.stages.artifacts import attention_config, sampler_settings, write_model
from turbotrain.stages.context import StageContext


def run(context: StageContext) -> dict[str, object]:
    teacher, sla, rcm = (context.load(role) for role in ("teacher", "sla", "rcm"))
    before, trained, distilled = teacher.state_dict(), sla.state_dict(), rcm.state_dict()
    weight = context.config.merge.weight
    only_sla = sorted(trained.keys() - distilled.keys())
    strange = [key for key in only_sla if ".proj_l." not in key] + sorted(distilled.keys() - trained.keys())
    if strange:
        raise ValueError(
            f"merge: the SLA and rCM networks differ in more than SLA's projections: {', '.join(strange[:8])}"
        )
    merged = {key: value + weight * (trained[key] - before[key]) for key, value in distilled.items()}
    merged.update({key: trained[key] for key in only_sla})
    rcm.set_attention(attention_config(context.config))
    write_model(context, merged, rcm, sampler=sampler_settings(context.config))
    return {"weight": weight, "merged": len(distilled), "from_sla": len(only_sla)}
