"""Errors of single layers, and the fewest layers to keep in float."""

from __future__ import annotations

import copy

import pytest
import torch
from quant_networks import SLA, forward_calls, network, plant_outliers

from turbotrain.quant import float_layers, layer_sensitivity, predicted_error, quantize_transformer
from turbotrain.quant.sensitivity import linear_names


def test_each_layer_is_quantised_alone_and_the_model_stays() -> None:
    model = plant_outliers(network(SLA))
    before = copy.deepcopy(model.state_dict())
    calls = forward_calls(2)
    errors = layer_sensitivity(model, calls)
    assert list(errors) == linear_names(model)
    assert len(errors) == 2 * 10
    assert all(error > 0 for error in errors.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # One loud channel takes the others' resolution: its readers err most.
    assert errors["blocks.0.ffn.2"] > errors["blocks.0.cross_attn.k"]
    # Quantised together they err about as much as squares add up to.
    whole = quantize_transformer(model, calls, calls, alphas=())
    assert whole.mean_latent_error == pytest.approx(predicted_error(errors), rel=0.6)
    with pytest.raises(ValueError, match="quantised already"):
        layer_sensitivity(model, calls)
    with pytest.raises(ValueError, match="calls is empty"):
        layer_sensitivity(network(SLA), [])


def test_the_worst_layers_stay_in_float_until_the_rest_is_good_enough() -> None:
    errors = {"a": 0.03, "b": 0.04, "c": 0.12, "d": 0.0}
    assert predicted_error(errors) == pytest.approx(0.13)
    assert float_layers(errors, 0.13) == []
    assert float_layers(errors, 0.05) == ["c"]
    assert float_layers(errors, 0.03) == ["c", "b"]
    assert float_layers(errors, 0.0) == ["c", "b", "a"]
    with pytest.raises(ValueError, match="target=-1"):
        float_layers(errors, -1)


def test_a_target_is_met_and_the_layers_in_float_say_why() -> None:
    model = plant_outliers(network(SLA))
    calls = forward_calls(2)
    errors = layer_sensitivity(model, calls)
    target = 0.5 * predicted_error(errors)
    whole, mixed = (copy.deepcopy(model) for _ in range(2))
    held_out = forward_calls(2, seed=1)
    plain = quantize_transformer(whole, calls, held_out, alphas=())
    report = quantize_transformer(
        mixed, calls, held_out, alphas=(), target_error=target
    )  # chosen by the calls, judged by others
    assert report.sensitivity == pytest.approx(errors)
    kept = report.metadata()["kept_float"]
    assert set(kept) == set(float_layers(errors, target))
    assert all(f"wanted {target:g}" in reason for reason in kept.values())
    assert report.mean_latent_error is not None
    assert plain.mean_latent_error is not None
    assert report.mean_latent_error < 0.8 * plain.mean_latent_error
    assert all(isinstance(mixed.get_submodule(name), torch.nn.Linear) for name in kept)
    assert plain.sensitivity == {}
    with pytest.raises(ValueError, match="calls is empty"):
        quantize_transformer(copy.deepcopy(model), [], target_error=target)


def test_latents_that_are_not_finite_are_refused_before_anything_is_chosen() -> None:
    model = network(SLA)
    seen: list[int] = []

    def broken(model: torch.nn.Module) -> torch.Tensor:
        seen.append(1)
        return torch.tensor([1.0, torch.nan])

    for held_out, target in (([], 0.1), ([broken], 0.0)):
        seen.clear()
        with pytest.raises(ValueError, match="not finite"):
            quantize_transformer(model, [broken], held_out, target_error=target)
        assert len(seen) == 1  # not once for every linear

    def one_fails(model: torch.nn.Module) -> torch.Tensor:
        return torch.ones(2) if isinstance(model.get_submodule("blocks.1.ffn.2"), torch.nn.Linear) else broken(model)

    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.2.*int8_channel"):
        layer_sensitivity(model, [one_fails])
    assert isinstance(model.get_submodule("blocks.1.ffn.2"), torch.nn.Linear)
