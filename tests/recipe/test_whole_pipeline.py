"""The recipe `shapes`, every stage in its shortest form: from the shipped teacher to a quantized checkpoint and a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbotrain.checkpoint import read_meta
from turbotrain.cli import train_main
from turbotrain.pipeline import TurboPipeline


@pytest.mark.slow
def test_every_stage_of_the_shapes_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "recipe=shapes",
        f"output_dir={tmp_path}",
        "launch.device=cpu",
        "data.count=8",
        "data.batch_size=4",
        "sla.steps=1",
        "sla.batch_size=2",
        "sla.sample_every=1",
        "rcm.phases=[{cm: scm, dmd: false, steps: 1}, {cm: dcm, dmd: true, steps: 2}]",
        "rcm.batch_size=2",
        "rcm.tangent_warmup=0",
        "quantize.prompts=1",
        "quantize.held_out_prompts=1",
        "evaluate.prompts=3",
        "evaluate.turbo_steps=[4,1]",
        "evaluate.strips=1",
        "evaluate.latency_repeats=1",
        "sampler.teacher.steps=2",
    ]
    assert train_main(arguments) == 0, capsys.readouterr().err
    run = tmp_path / "shapes"
    report = json.loads((run / "evaluate" / "report.json").read_text())
    keys = {(row["model"], row["sampler"], row["steps"]) for row in report["rows"]}
    turbo = {(model, "turbo", steps) for model in ("teacher", "sla", "rcm", "turbo") for steps in (4, 1)}
    assert keys == {("teacher", "teacher", 2), ("sla", "teacher", 2), *turbo}
    for row in report["rows"]:
        assert 0 <= row["accuracy"] <= 1
        assert row["latency_s"] > 0
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "sla" / "samples" / "step_00000001.png").is_file()
    meta = read_meta(run / "quantize" / "checkpoint")
    assert meta.quantization is not None
    assert meta.quantization["scheme"] == "int8_channel"
    assert [entry["stage"] for entry in meta.lineage][-3:] == ["sla", "rcm", "quantize"]
    pipe = TurboPipeline.from_checkpoint(run / "quantize" / "checkpoint", device="cpu")
    frames = pipe("a small red circle moves left slowly on a black background", steps=1, seed=3).frames
    assert frames.shape == (13, 64, 64, 3)

    assert train_main(arguments) == 0
    assert capsys.readouterr().out.count("done already, skipped") == 5
