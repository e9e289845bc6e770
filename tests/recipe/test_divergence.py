"""A loss that turns NaN stops the stage; once the cause is gone the same command ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_world import World, arguments, read_metrics, read_status, train_here, weights

import turbotrain.stages.rcm
import turbotrain.stages.sla
from turbotrain.losses import LossOutput


def test_a_nan_loss_stops_sla(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = arguments(world, tmp_path, "stages=[sla]", "sla.max_bad_steps=2", "sla.save_every=5")
    loss = turbotrain.stages.sla.sla_alignment
    calls = 0

    def spoilt(*args: Any, **kwargs: Any) -> LossOutput:
        nonlocal calls
        calls += 1
        out = loss(*args, **kwargs)
        return out if calls <= 3 else dataclasses.replace(out, loss=out.loss * float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(turbotrain.stages.sla, "sla_alignment", spoilt)
        assert train_here(*overrides) == 1
    error = capsys.readouterr().err
    for word in ("sla: 2 steps in a row", "the state after step 3", "learning rate", "rerun"):
        assert word in error, error
    stage = tmp_path / "run" / "sla"
    assert not (stage / "checkpoint").exists()
    assert read_status(stage)["status"] == "running"
    assert train_here(*overrides) == 0
    resumed, expected = weights(stage), weights(whole / "sla")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_rcm_stops_when_every_sample_is_dropped(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """scm gives a sample without a finite tangent the loss zero: a whole batch of them is not a perfect student."""
    loss = turbotrain.stages.rcm.scm

    def blind(*args: Any, **kwargs: Any) -> LossOutput:
        out = loss(*args, **kwargs)
        return dataclasses.replace(out, loss=out.loss * 0, metrics={**out.metrics, "dropped": torch.tensor(2)})

    monkeypatch.setattr(turbotrain.stages.rcm, "scm", blind)
    overrides = arguments(world, tmp_path, "stages=[rcm]", "rcm.composition=joint", "rcm.max_bad_steps=2")
    assert train_here(*overrides) == 1
    assert "rcm: 2 steps in a row without a finite loss or gradient" in capsys.readouterr().err
    assert [line["dropped"] for line in read_metrics(tmp_path / "run" / "rcm")] == [2, 2]
