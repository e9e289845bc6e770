"""A quantised network on disk: its metadata, a strict reload, and the same latents from the reloaded one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from quant_networks import SLA, forward_calls, network, plant_outliers, relative
from safetensors.torch import load_file, save_file
from torch import nn
from turbokernels.w8a8.api import SCHEMES

from turbotrain.model.quant_linear import (
    QuantLinear,
    dequantize_model,
    from_disk_names,
    prepare_quantized,
    to_disk_names,
)
from turbotrain.model.wan import WanTransformer
from turbotrain.quant import quantize_transformer


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_reload_from_safetensors_gives_the_same_latents(scheme: str, tmp_path: Path) -> None:
    model = plant_outliers(network(SLA))
    quantize_transformer(model, forward_calls(3), scheme=scheme)
    save_file(to_disk_names(model.state_dict()), tmp_path / "model.safetensors")

    state = from_disk_names(load_file(tmp_path / "model.safetensors"))
    with torch.device("meta"):
        reloaded = WanTransformer(model.config, model.attention_config)
    prepare_quantized(reloaded, state).load_state_dict(state, strict=True, assign=True)
    assert {name: type(module) for name, module in reloaded.named_modules()} == {
        name: type(module) for name, module in model.named_modules()
    }
    for call in forward_calls(2, seed=5):
        assert torch.equal(call(reloaded), call(model))


@torch.no_grad()
def test_a_file_that_lacks_a_vector_or_a_scale_is_refused() -> None:
    model = plant_outliers(network(SLA))
    quantize_transformer(model, forward_calls(3))
    state = model.state_dict()
    prepared = prepare_quantized(WanTransformer(model.config, model.attention_config), state)
    for missing in ("blocks.0.smooth_attn", "blocks.1.ffn.2.smooth", "blocks.0.self_attn.q.bias"):
        with pytest.raises(RuntimeError, match=missing):
            prepared.load_state_dict({name: tensor for name, tensor in state.items() if name != missing}, strict=True)


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
