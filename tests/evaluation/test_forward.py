"""The clock of one network step with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from turbotrain.evaluation.forward import benchmark_forward, random_inputs
from turbotrain.inference import main
from turbotrain.model.inputs import check_inputs
from turbotrain.model.variants import VARIANTS


def test_rows_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "forward.json"
    given = ["mode=benchmark", "weights=random", "variant=shapes", "attention_kind=sla", "scheme=int8_channel"]
    assert main([*given, "repeats=2", "frames=5", "device=cpu", f"json={target}"]) == 0
    assert "dense / this" in capsys.readouterr().out
    result = json.loads(target.read_text())
    assert list(result["rows"]) == ["dense", "sla int8_channel"]
    dense, chosen = result["rows"].values()
    assert dense["speedup"] == {"dense": 1.0}
    assert chosen["speedup"]["dense"] == pytest.approx(dense["median_s"] / chosen["median_s"])
    assert result["settings"]["latent_shape"] == [24, 2, 8, 8]


def test_dense_alone_is_one_row() -> None:
    shapes = VARIANTS["shapes"]
    result = benchmark_forward(shapes, shapes.latent_shape(5, 64, 64), repeats=1, warmup=0)
    assert list(result["rows"]) == ["dense"]
    assert result["settings"]["dtype"] == "float32"


@pytest.mark.parametrize("name", VARIANTS)
def test_inputs_fit_every_variant(name: str) -> None:
    variant = VARIANTS[name]
    height, width = (2 * multiple for multiple in variant.size_multiple)
    with torch.device("meta"):
        given = random_inputs(variant.config, variant.latent_shape(5, height, width), 1)
    optional = [given.get(key) for key in ("y_BCTHW", "clip_BLD")]
    assert check_inputs(variant.config, *list(given.values())[:3], *optional, None, None)[0] == 2
