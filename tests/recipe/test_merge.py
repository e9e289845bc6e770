"""Merge: W = W_rcm + w (W_sla - W_teacher), and SLA's own projections."""

from __future__ import annotations

from pathlib import Path

import torch
from recipe_world import World, arguments, train_here, weights
from safetensors.torch import load_file

from turbotrain.checkpoint import load_transformer, read_meta


def test_merge_adds_what_sla_learnt_to_the_distilled_network(world: World, tmp_path: Path) -> None:
    overrides = arguments(
        world,
        tmp_path,
        "stages=[sla,rcm,merge]",
        "rcm.composition=merge",
        "rcm.phases=[{cm: scm, dmd: false, steps: 1}]",
        "sla.steps=2",
        "merge.weight=0.5",
    )
    assert train_here(*overrides) == 0
    run = tmp_path / "run"
    teacher = load_file(world.teacher / "model.safetensors")
    sla, rcm, merged = (weights(run / stage) for stage in ("sla", "rcm", "merge"))
    assert rcm.keys() == teacher.keys(), "rCM trained the dense network"
    assert any(not torch.equal(rcm[name], teacher[name]) for name in teacher)
    projections = merged.keys() - rcm.keys()
    assert len(projections) == 8
    assert all(".proj_l." in name for name in projections)
    for name in projections:
        assert torch.equal(merged[name], sla[name])
        assert sla[name].count_nonzero() > 0, "SLA moved its projections away from zero"
    for name, value in teacher.items():
        torch.testing.assert_close(
            merged[name], (rcm[name].double() + 0.5 * (sla[name].double() - value.double())).float()
        )
    meta = read_meta(run / "merge" / "checkpoint")
    assert meta.attention["kind"] == "sla"
    assert meta.sampler is not None
    assert [entry["stage"] for entry in meta.lineage][-1] == "merge"
    assert load_transformer(run / "merge" / "checkpoint").attention_config.kind == "sla"
