"""A quantised network on disk: its metadata, a strict reload, and the same latents from the reloaded one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_networks import SLA, forward_calls, network, plant_outliers, relative
from safetensors.torch import load_file
from torch import nn
from turbokernels.w8a8.api import SCHEMES

from turbotrain.checkpoint import CheckpointMeta, CheckpointProblem, load_transformer, read_meta, save_checkpoint
from turbotrain.model.quant_linear import QuantLinear, dequantize_model
from turbotrain.model.wan import WanTransformer
from turbotrain.quant import quantize_transformer


def save(model: WanTransformer, quantization: dict[str, Any], folder: Path, drop: str = "") -> Path:
    state = {name: tensor for name, tensor in model.state_dict().items() if name != drop}
    meta = CheckpointMeta(
        config=model.config.to_dict(), attention=model.attention_config.to_dict(), quantization=quantization
    )
    save_checkpoint(folder, state, meta)
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_reload_gives_the_same_latents(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = plant_outliers(network(SLA)).set_weight_dtype(dtype)
    report = quantize_transformer(model, forward_calls(3), scheme=scheme, min_sqnr_db=32.0)
    folder = save(model, report.metadata(), tmp_path / "turbo")
    names = set(load_file(folder / "model.safetensors"))
    suffix = "fp8_weight" if scheme == "fp8_channel" else "int8_weight"
    assert {name for name in names if name.endswith("8_weight")} == {
        f"{layer.name}.{suffix}" for layer in report.layers if layer.kept_float is None
    }

    reloaded = load_transformer(folder)
    assert {name: type(module) for name, module in reloaded.named_modules()} == {
        name: type(module) for name, module in model.named_modules()
    }
    for call in forward_calls(2, seed=5):
        assert torch.equal(call(reloaded), call(model))
    assert read_meta(folder).quantization == report.metadata()


@pytest.mark.parametrize("drop", ["blocks.1.ffn.2.scale", "blocks.0.self_attn.q.bias"])
def test_an_incomplete_file_is_refused(drop: str, tmp_path: Path) -> None:
    model = plant_outliers(network(SLA))
    report = quantize_transformer(model, forward_calls(3))
    with pytest.raises(CheckpointProblem, match=drop):
        load_transformer(save(model, report.metadata(), tmp_path / "turbo", drop))


def test_metadata_is_json_and_names_every_layer() -> None:
    model = plant_outliers(network())
    stricter = copy.deepcopy(model)
    report = quantize_transformer(model, forward_calls(3), forward_calls(2, seed=5))
    metadata = json.loads(json.dumps(report.metadata()))
    assert metadata["scheme"] == "int8_channel"
    assert set(metadata["layers"]) == {
        name for name, module in model.named_modules() if isinstance(module, QuantLinear)
    }
    assert metadata["layers"]["blocks.0.ffn.0"].keys() == {"scheme", "alpha", "sqnr_db"}
    assert metadata["kept_float"] == {}
    assert metadata["latent_error"] == pytest.approx(sum(report.latent_errors) / 2)

    full = json.loads(json.dumps(report.to_dict()))
    assert [layer["name"] for layer in full["layers"]] == [layer.name for layer in report.layers]
    assert len(full["layers"]) == 20
    # Two calls: the mean squared error lies between its smallest and largest.
    worst, best = (-20 * torch.tensor(pick(report.latent_errors)).log10() for pick in (max, min))
    assert worst <= full["latent_sqnr_db"] <= best

    threshold = sorted(layer.sqnr_db for layer in report.layers)[4]
    kept = quantize_transformer(stricter, forward_calls(3), min_sqnr_db=threshold).metadata()
    assert kept["latent_error"] is None
    assert kept["kept_float"]
    assert not set(kept["kept_float"]) & set(kept["layers"])
    assert all(isinstance(stricter.get_submodule(name), nn.Linear) for name in kept["kept_float"])


@torch.no_grad()
def test_end_to_end_error_is_that_of_the_two_models() -> None:
    model = network(SLA)
    original = copy.deepcopy(model)
    held_out = forward_calls(2, seed=5)
    report = quantize_transformer(model, forward_calls(3), held_out)
    for call, error in zip(held_out, report.latent_errors):
        assert error == pytest.approx(relative(call(model), call(original)), rel=1e-9)
        assert 0 < error < 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_dequantised_network_is_the_float_one_again(scheme: str) -> None:
    model = plant_outliers(network(SLA), gain=10.0)
    original = copy.deepcopy(model)
    report = quantize_transformer(model, forward_calls(3), forward_calls(1, seed=5), scheme=scheme)
    quantised = copy.deepcopy(model)
    dequantize_model(model)
    assert list(model.state_dict()) == list(original.state_dict())
    (call,) = forward_calls(1, seed=5)
    # Weights stay rounded to 8 bits, activations no longer are.
    assert relative(call(model), call(original)) < 1.5 * report.latent_errors[0]
    assert relative(call(model), call(quantised)) < 2.5 * report.latent_errors[0]
