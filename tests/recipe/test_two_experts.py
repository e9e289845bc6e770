"""Quantising the two experts of Wan 2.2: calibrated together, each on its own range of times, written as a folder of both."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_world import ROOT, train_here
from tiny_wan import KINDS, run_arguments, use_tiny, write_model, write_picture

import turbotrain.stages.quantize as quantize_stage
from turbotrain.checkpoint import load_transformer, read_meta
from turbotrain.model.quant_linear import QuantLinear
from turbotrain.model.wan import WanTransformer
from turbotrain.pipeline import TurboPipeline
from turbotrain.quant import quantize_transformer

sys.path.insert(0, str(ROOT / "tools"))
import build_dataset

NAME = KINDS["two experts"]
BOUNDARY = 900.0


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of two experts, and shards drawn from it."""
    folder = tmp_path_factory.mktemp("two")
    write_picture(folder / "a.png")
    (folder / "list.jsonl").write_text(
        "\n".join(f'{{"prompt": "a {word} thing", "image": "a.png"}}' for word in ("red", "green", "blue"))
    )
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch)
        model = write_model(folder / "model", NAME)
        given = ["--model", str(model), "--variant", NAME, "-o", str(folder / "shards"), "--device", "cpu"]
        assert build_dataset.main(["teacher", str(folder / "list.jsonl"), *given, "--steps", "2"]) == 0
    return model, folder / "shards"


def arguments(made: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    return [
        *run_arguments("wan2.2_i2v_a14b", *made, output),
        "stages=[quantize]",
        "model.expert=both",
        "launch.mixed_precision=no",
        "quantize.prompts=2",
        "quantize.held_out_prompts=1",
        "quantize.alphas=[0.5]",
        *more,
    ]


def finish_training(made: tuple[Path, Path], output: Path, *experts: str) -> Path:
    """What the runs of these experts leave: their teachers as students."""
    run = output / "wan2.2_i2v_a14b"
    for expert in experts:
        stage = run / expert / "rcm"
        shutil.copytree(made[0] / expert, stage / "checkpoint")
        (stage / "stage.json").write_text(json.dumps({"status": "done", "fingerprint": {}}))
    return run


def test_each_expert_is_calibrated_on_its_own_times_and_both_are_written(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finish_training(made, tmp_path, "high", "low")
    asked: dict[int, list[float]] = {}
    forward = WanTransformer.forward

    def noting(self: WanTransformer, x: torch.Tensor, timestep: torch.Tensor, *given: Any, **more: Any) -> Any:
        asked.setdefault(id(self), []).extend(timestep.flatten().tolist())
        return forward(self, x, timestep, *given, **more)

    order: list[tuple[int, bool]] = []

    def noting_order(network: WanTransformer, calls: Any, *given: Any, **more: Any) -> Any:
        before = {key: len(times) for key, times in asked.items()}
        report = quantize_transformer(network, calls, *given, **more)
        order.append((id(network), all(len(asked[key]) > count for key, count in before.items())))
        return report

    monkeypatch.setattr(WanTransformer, "forward", noting)
    monkeypatch.setattr(quantize_stage, "quantize_transformer", noting_order)
    assert train_here(*arguments(made, tmp_path)) == 0
    (high, together), (low, also) = order
    assert together, "the other expert answers too while one is calibrated"
    assert also
    assert min(asked[high]) >= BOUNDARY > max(asked[low])
    checkpoint = run / "quantize" / "checkpoint"
    assert sorted(path.name for path in checkpoint.iterdir()) == ["high", "low"]
    teachers = {expert: load_transformer(made[0] / expert) for expert in ("high", "low")}
    for expert in ("high", "low"):
        meta = read_meta(checkpoint / expert)
        assert meta.quantization is not None
        assert meta.quantization["scheme"] == "int8_channel"
        assert meta.lineage[-1]["stage"] == "quantize"
        assert {"high", "low"} <= meta.lineage[-1]["inputs"].keys()
        network = load_transformer(checkpoint / expert)
        layer, own = network.get_submodule("blocks.1.ffn.2"), teachers[expert].get_parameter("blocks.1.ffn.2.weight")
        other = teachers["low" if expert == "high" else "high"].get_parameter("blocks.1.ffn.2.weight")
        assert isinstance(layer, QuantLinear)
        assert (layer.dequantize() - own).norm() < 0.02 * own.norm() < (own - other).norm(), "its own weights"
    report = json.loads((run / "quantize" / "report.json").read_text())
    assert {"high", "low", "latent_errors", "latent_error"} == report.keys()
    assert len(report["latent_errors"]) == 1
    assert 0 < report["latent_error"] < 0.2
    assert report["high"]["layers"][0]["input_absmax"] != report["low"]["layers"][0]["input_absmax"]
    assert len(TurboPipeline.from_checkpoint(checkpoint, device="cpu").experts) == 2


@pytest.mark.parametrize(
    ("trained", "more", "status", "words"),
    [
        (["low"], [], 2, "the high-noise expert's student: train that one too, with model.expert=high"),
        (["high", "low"], ["model.expert=low"], 2, "quantize.*run it with model.expert=both when both are trained"),
        (["high", "low"], ["stages=[sla]"], 2, "sla.*is of one expert: model.expert=low, then high"),
        (["high", "low"], ["quantize.steps=1"], 1, "quantize.steps=1: none of them is the low-noise expert's"),
    ],
)
def test_what_cannot_be_quantised_is_refused(
    trained: list[str],
    more: list[str],
    status: int,
    words: str,
    made: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finish_training(made, tmp_path, *trained)
    assert train_here(*arguments(made, tmp_path, *more)) == status
    error = capsys.readouterr().err
    assert re.search(words, error), error
