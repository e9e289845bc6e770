"""Calibration: what it observes, what it chooses, and that the choice pays."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from quant_networks import SLA, forward_calls, network, plant_outliers, relative
from torch import nn
from turbokernels.w8a8.api import SCHEMES

from turbotrain.model.wan import WanTransformer
from turbotrain.quant import InputStats, Plan, apply_plan, choose, model_sites, observe, quantize_transformer
from turbotrain.quant.calibrate import noise_ratio, smoothing_vector, sqnr_db

SMOOTHABLE = ("self_attn.q", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


def test_stats_are_extremes_and_rows_of_what_was_seen() -> None:
    stats = InputStats(max_rows=40, seed=0)
    seen = [torch.randn(3, 50, 8) * scale for scale in (1, 5, 2)]
    for x in seen:
        stats.add(x)
    everything = torch.cat([x.flatten(0, 1) for x in seen])
    assert stats.absmax_K is not None
    assert torch.equal(stats.absmax_K, everything.abs().amax(0))
    rows = stats.rows_RK
    assert rows.shape == (40, 8)
    assert all((everything == row).all(1).any() for row in rows)
    assert len({tuple(row.tolist()) for row in rows}) == 40  # without repetition


def test_the_sample_is_spread_over_all_passes() -> None:
    stats = InputStats(max_rows=300, seed=0)
    for index in range(100):
        stats.add(torch.full((64, 1), float(index)))
    # 300 of 3200 offered rows: each third holds 100 on average, with a standard deviation under 8.
    thirds = torch.histc(stats.rows_RK, bins=3, min=0, max=99)
    assert (thirds - 100).abs().max() < 40


def test_the_sample_shares_no_memory_with_activations() -> None:
    stats = InputStats(max_rows=4, seed=0)
    stats.add(torch.randn(1000, 8))
    assert all(row.untyped_storage().nbytes() == 32 for row in stats._rows)


def test_smoothing_vector_balances() -> None:
    inputs, weights = torch.tensor([100.0, 1.0, 0.0, 4.0]), torch.tensor([0.01, 1.0, 1.0, 0.0])
    vector = smoothing_vector(inputs, weights, 0.5)
    assert vector[2:].tolist() == [1.0, 1.0]  # always-zero channels
    assert torch.equal(vector, vector.bfloat16().float())
    # alpha 0.5 makes both operands equally large in each channel, up to bf16.
    ratio = (inputs / vector)[:2] / (weights * vector)[:2]
    assert ratio[0] / ratio[1] == pytest.approx(1.0, rel=0.02)
    assert vector[:2].log().sum().abs() < 0.01


def test_noise_ratio_against_float64() -> None:
    # Seeded: three draws in a thousand hold a weight so near a rounding tie that float32 and float64 round it apart.
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 40, generator=generator), torch.randn(16, 40, generator=generator)
    x[0] = 0
    ratio = noise_ratio(x, weight, "int8_channel")
    exact = x.double() @ weight.double().t()
    x_scale = x.double().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    w_scale = weight.double().abs().amax(1, keepdim=True) / 127
    quantised = ((x / x_scale).round() * x_scale) @ ((weight / w_scale).round() * w_scale).t()
    expected = (quantised - exact).square().sum() / exact.square().sum()
    assert ratio == pytest.approx(expected.item(), rel=1e-3)
    assert 30 < sqnr_db(ratio) < 50
    assert noise_ratio(torch.zeros(4, 8), torch.ones(2, 8), "int8_channel") == 0.0
    assert sqnr_db(0.0) == 200.0


@pytest.mark.parametrize("attention", [None, SLA], ids=["dense", "sla"])
def test_calibration_recovers_planted_outliers(attention) -> None:
    model = plant_outliers(network(attention))
    plain, smooth = copy.deepcopy(model), copy.deepcopy(model)
    calls, held_out = forward_calls(4, seed=1), forward_calls(2, seed=2)
    unsmoothed = quantize_transformer(plain, calls, held_out, alphas=())
    smoothed = quantize_transformer(smooth, calls, held_out)

    gains = {}
    for before, after in zip(unsmoothed.layers, smoothed.layers):
        assert before.name == after.name
        assert before.alpha is None
        if after.name.split(".", 2)[2] in SMOOTHABLE:
            assert after.alpha is not None
            gains[after.name] = after.sqnr_db - before.sqnr_db
    # An outlier 60 times the rest costs log2(60) = 6 bits of 6 dB; most of that must come back.
    assert len(gains) == 2 * len(SMOOTHABLE)
    assert min(gains.values()) > 3, gains
    assert sum(gains.values()) / len(gains) > 8, gains
    assert smoothed.mean_latent_error is not None
    assert unsmoothed.mean_latent_error is not None
    assert smoothed.mean_latent_error < 0.7 * unsmoothed.mean_latent_error


def test_smoothing_is_only_chosen_where_it_helps() -> None:
    model = network()
    plan = choose(model, observe(model, forward_calls(3)))
    for block_name, _, site in model_sites(model):  # a shared vector is judged by the sum of its linears' noise
        names = {f"{block_name}.{name}" for name in site.linears}
        layers = [layer for layer in plan.layers if layer.name in names]
        assert len({layer.alpha for layer in layers}) == 1
        chosen = sum(10 ** (-layer.sqnr_db / 10) for layer in layers)
        plain = sum(10 ** (-layer.unsmoothed_sqnr_db / 10) for layer in layers)
        assert chosen <= plain * (1 + 1e-9)


def folded_only(model: WanTransformer, plan: Plan) -> nn.Module:
    """The float network with the plan's vectors folded and nothing quantised (ffn.2's vector belongs to
    QuantLinear).
    """
    kept = [dataclasses.replace(layer, kept_float="stays float in this test") for layer in plan.layers]
    return apply_plan(copy.deepcopy(model), dataclasses.replace(plan, layers=kept))


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_reported_sqnr_is_what_the_quantised_layer_does(scheme: str) -> None:
    """Measured again on the modules that were put in place, with all their inputs instead of a sample."""
    model = plant_outliers(network(SLA), gain=10.0)
    plan = choose(model, observe(model, forward_calls(4), max_rows=100), scheme)
    folded, quantised = folded_only(model, plan), apply_plan(copy.deepcopy(model), plan)
    # A tile's largest row sets the step of 128 rows: whether the sample holds it counts for more than with a step per row.
    tolerance = 3.0 if scheme == "int8_block128" else 1.5
    inputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in plan.layers}
    for name, seen in inputs.items():
        folded.get_submodule(name).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
    for call in forward_calls(4):
        call(folded)
    for layer in plan.layers:
        x = torch.cat(inputs[layer.name]).flatten(0, 1)
        signal = folded.get_submodule(layer.name)(x).double()
        noise = quantised.get_submodule(layer.name)(x).double() - signal
        signal -= folded.get_submodule(layer.name).get_parameter("bias")
        measured = sqnr_db((noise.square().sum() / signal.square().sum()).item())
        assert abs(measured - layer.sqnr_db) < tolerance, layer


def test_block128_uses_no_vector_that_a_published_file_cannot_hold() -> None:
    model = plant_outliers(network(SLA))
    report = quantize_transformer(model, forward_calls(3), scheme="int8_block128")
    smoothed = {layer.name.split(".", 2)[2] for layer in report.layers if layer.alpha is not None}
    assert smoothed <= {"self_attn.o", "cross_attn.o", "cross_attn.q"}
    assert smoothed
    assert not any("smooth" in name for name in model.state_dict())


def test_min_sqnr_keeps_layers_in_float() -> None:
    model = plant_outliers(network())
    stats = observe(model, forward_calls(3))
    everything = choose(model, stats, alphas=(0.5,))
    ordered = sorted(layer.sqnr_db for layer in everything.layers)
    threshold = (ordered[7] + ordered[8]) / 2
    plan = choose(model, stats, alphas=(0.5,), min_sqnr_db=threshold)
    kept = [layer for layer in plan.layers if layer.kept_float is not None]
    assert 6 <= len(kept) <= 10  # a site without its vector may lift or drop a neighbour
    for layer in kept:
        assert layer.scheme == "float"
        assert layer.kept_float is not None
        assert "min_sqnr_db" in layer.kept_float
    apply_plan(model, plan)
    for layer in plan.layers:
        assert isinstance(model.get_submodule(layer.name), nn.Linear) == (layer.kept_float is not None)
    (call,) = forward_calls(1, seed=5)
    with torch.no_grad():
        assert call(model).isfinite().all()

    exact = plant_outliers(network())
    untouched = copy.deepcopy(exact)
    report = quantize_transformer(exact, forward_calls(3), forward_calls(1, seed=5), min_sqnr_db=1000.0)
    assert all(layer.kept_float for layer in report.layers)
    assert report.latent_errors == [0.0]  # nothing quantised, nothing folded
    assert all(torch.equal(a, b) for a, b in zip(exact.state_dict().values(), untouched.state_dict().values()))


def test_a_partly_kept_site_still_computes_the_float_function() -> None:
    """Layers kept in float beside a smoothed neighbour carry the vector in their weights."""
    model = plant_outliers(network(SLA))
    plan = choose(model, observe(model, forward_calls(3)))
    assert len(plan.vectors) == 12
    folded = folded_only(model, plan)
    (call,) = forward_calls(1, seed=5)
    with torch.no_grad():
        assert relative(call(folded), call(model)) < 1e-5


def test_same_seed_same_plan() -> None:
    model = network(SLA)
    plans = [choose(model, observe(model, forward_calls(3), max_rows=40, seed=7)) for _ in range(2)]
    assert plans[0].layers == plans[1].layers
    assert all(torch.equal(plans[0].vectors[name], plans[1].vectors[name]) for name in plans[0].vectors)


def test_bf16_model() -> None:
    model = plant_outliers(network(SLA), gain=10.0).set_weight_dtype(torch.bfloat16)
    report = quantize_transformer(model, forward_calls(3), forward_calls(1, seed=5))
    assert report.mean_latent_error is not None
    assert 0 < report.mean_latent_error < 0.2


def test_bad_input_is_named() -> None:
    model = network()
    stats = observe(model, forward_calls(1))
    with pytest.raises(ValueError, match=r"1\.5"):
        choose(model, stats, alphas=(0.5, 1.5))
    with pytest.raises(ValueError, match="int8_channel"):
        choose(model, stats, scheme="int3")
    with pytest.raises(ValueError, match="no forward calls"):
        observe(model, [])
    with pytest.raises(ValueError, match=r"reached blocks\.0"):
        observe(model, [lambda model: None])
    broken = network()
    with torch.no_grad():
        broken.blocks[1].ffn[0].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.2 is NaN"):
        observe(broken, forward_calls(1))
    assert not any(module._forward_pre_hooks for module in broken.modules())
    quantize_transformer(model, forward_calls(1))
    with pytest.raises(ValueError, match="quantised already"):
        quantize_transformer(model, forward_calls(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_that_no_observed_input_shows_is_named(value: float) -> None:
    model = network()
    with torch.no_grad():
        model.blocks[-1].get_submodule("ffn.2").weight[0, 0] = value  # only the head reads what comes of it
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.2"):
        quantize_transformer(model, forward_calls(1))
