"""Runs that begin from other runs' results, and sparse attention without its linear branch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recipe_world import World, arguments, train_here, train_on, weights

from turbotrain.checkpoint import load_transformer, read_meta
from turbotrain.quant import LinearTimes, Seconds, export
from turbotrain.quant.sensitivity import linear_names


def test_a_run_starts_from_another_ones_sla(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["sla.steps=2", "rcm.phases=[{cm: scm, dmd: false, steps: 1}]"]
    assert train_here(*arguments(world, tmp_path, *short, "stages=[sla]")) == 0
    start = tmp_path / "run" / "sla" / "checkpoint"
    shared = arguments(world, tmp_path, *short, "name=other", "stages=[rcm]", f"model.sla={start}")
    assert train_here(*shared) == 0
    rcm = tmp_path / "other" / "rcm" / "checkpoint"
    assert [entry["stage"] for entry in read_meta(rcm).lineage] == ["sla", "rcm"]
    assert load_transformer(rcm).attention_config.kind == "sla"
    capsys.readouterr()
    assert train_here(*shared[:-1], f"model.sla={tmp_path / 'absent'}") == 2
    assert "model.sla" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_without_its_linear_branch_sla_trains_sparse_attention_alone(
    world: World, tmp_path: Path, processes: int
) -> None:
    alone = arguments(world, tmp_path, "stages=[sla]", "sla.steps=3", "sla.linear_branch=false")
    if processes == 1:
        assert train_here(*alone) == 0
    else:
        train_on(processes, *alone, "launch.engine=fsdp2")
    trained, before = weights(tmp_path / "run" / "sla"), load_transformer(world.teacher).state_dict()
    projections = [name for name in trained if ".proj_l." in name]
    assert len(projections) == 8
    assert all(trained[name].count_nonzero() == 0 for name in projections)
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def test_a_target_of_quantisation_keeps_layers_in_float_and_the_checkpoint_says_so(
    world: World, tmp_path: Path
) -> None:
    quick = ["sla.steps=1", "rcm.phases=[{cm: scm, dmd: false, steps: 1}]", "stages=[sla,rcm,quantize]"]
    calibrated = ["quantize.prompts=1", "quantize.held_out_prompts=1", "quantize.steps=1", "quantize.smooth=false"]
    tuned = ["quantize.finetune.steps=2", "quantize.finetune.prompts=2", "quantize.finetune.batch_size=1"]
    assert train_here(*arguments(world, tmp_path, *quick, *calibrated, *tuned, "quantize.target_error=2e-4")) == 0
    checkpoint = tmp_path / "run" / "quantize" / "checkpoint"
    recorded = read_meta(checkpoint).quantization
    assert recorded is not None
    assert recorded["kept_float"]
    assert recorded["layers"]
    assert all("wanted 0.0002" in reason for reason in recorded["kept_float"].values())
    assert recorded["finetune"]["steps"] == recorded["finetune"]["passes"] == 2
    assert recorded["latent_error"] <= recorded["finetune"]["latent_error_before"]
    report = json.loads((checkpoint.parent / "report.json").read_text())
    assert report["finetune"] == recorded["finetune"]
    network = load_transformer(checkpoint)
    kinds = {
        name: type(network.get_submodule(name)).__name__ for name in (*recorded["kept_float"], *recorded["layers"])
    }
    assert set(kinds.values()) == {"Linear", "QuantLinear"}


def test_a_time_of_quantisation_keeps_what_fits_and_the_checkpoint_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["sla.steps=1", "rcm.phases=[{cm: scm, dmd: false, steps: 1}]", "stages=[sla,rcm,quantize]"]
    calibrated = ["quantize.prompts=1", "quantize.held_out_prompts=1", "quantize.steps=2", "quantize.smooth=false"]
    run = arguments(world, tmp_path, *quick, *calibrated)
    # As it is: small products on a CPU are slower in 8 bits, so that this share is out of reach.
    assert train_here(*run, "quantize.target_latency=0.05") == 1
    refused = capsys.readouterr().err
    assert "target_latency=0.05: measured on " in refused
    assert "of their time in float32 when all are in 8 bits" in refused

    def invented(model: torch.nn.Module, *_: object) -> LinearTimes:
        seconds = {name: Seconds(3.0, 1.5) if "ffn" in name else Seconds(1.0, 0.8) for name in linear_names(model)}
        return LinearTimes(seconds, "an invented device", "float32")

    monkeypatch.setattr(export, "time_linears", invented)
    assert train_here(*run, "quantize.target_latency=0.8") == 0
    assert "foretold on an invented device" in capsys.readouterr().out
    checkpoint = tmp_path / "run" / "quantize" / "checkpoint"
    recorded = read_meta(checkpoint).quantization
    assert recorded is not None
    latency, kept = recorded["latency"], recorded["kept_float"]
    assert latency["all_quantised"] < latency["predicted"] <= latency["target"] == 0.8
    assert kept
    assert all("wanted 0.8 of the time in float" in reason for reason in kept.values())
    report = json.loads((checkpoint.parent / "report.json").read_text())["latency"]
    assert {name: report[name] for name in latency} == latency
    times = LinearTimes({name: Seconds(*took) for name, took in report["seconds"].items()}, "", "")
    network = load_transformer(checkpoint)
    in_float = {name for name in times.seconds if isinstance(network.get_submodule(name), torch.nn.Linear)}
    assert in_float == set(kept)
    assert times.share(in_float) == latency["predicted"]
