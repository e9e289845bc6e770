"""The clock of one network step with random weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from turbotrain.evaluation import forward
from turbotrain.evaluation.forward import COMPILED, DENSE, FIELD, TEACHERS, benchmark_forward
from turbotrain.evaluation.random_weights import random_inputs
from turbotrain.inference import main
from turbotrain.model.inputs import check_inputs
from turbotrain.model.variants import VARIANTS


def test_rows_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "forward.json"
    given = ["mode=benchmark", "weights=random", "scope=network", "variant=shapes", "attention_kind=sla"]
    assert main([*given, "repeats=2", "frames=5", "device=cpu", f"json={target}"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in TEACHERS if name != COMPILED)  # which is for GPUs
    result = json.loads(target.read_text())
    assert list(result["rows"]) == [DENSE, FIELD, "sla int8_channel"]
    dense, field, chosen = result["rows"].values()
    assert dense["speedup"][DENSE] == field["speedup"][FIELD] == 1.0
    assert chosen["speedup"][FIELD] == pytest.approx(field["median_s"] / chosen["median_s"])
    assert dense["repeats"] == 2
    assert result["settings"]["latent_shape"] == [24, 2, 8, 8]


def test_dense_alone_is_beside_the_fields() -> None:
    shapes = VARIANTS["shapes"]
    result = benchmark_forward(shapes, shapes.latent_shape(5, 64, 64), repeats=1, warmup=0)
    assert list(result["rows"]) == [DENSE, FIELD]
    assert result["settings"]["dtype"] == "float32"


def test_slow_calls_are_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "PATIENCE_S", 0.05)
    calls: list[float] = []

    def slow() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.03)

    row = forward.timed(slow, torch.device("cpu"), repeats=50, warmup=1)
    assert row["repeats"] == len(calls) - 2 <= 2
    assert row["min_s"] >= 0.03


@pytest.mark.parametrize("name", VARIANTS)
def test_inputs_fit_every_variant(name: str) -> None:
    variant = VARIANTS[name]
    height, width = (2 * multiple for multiple in variant.size_multiple)
    with torch.device("meta"):
        given = random_inputs(variant.config, variant.latent_shape(5, height, width), 1)
    optional = [given.get(key) for key in ("y_BCTHW", "clip_BLD")]
    assert check_inputs(variant.config, *list(given.values())[:3], *optional, None, None)[0] == 2
