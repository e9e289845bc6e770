"""Linears within a time: the choice against every other one, what is timed, and what is refused."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from quant_networks import SLA, forward_calls, network, plant_outliers
from torch import nn

from turbotrain.quant import LinearTimes, Seconds, export, latency, quantize_transformer
from turbotrain.quant.latency import float_layers_in_time, time_linears
from turbotrain.quant.sensitivity import linear_names, predicted_error

ROUNDING = 1e-12  # of sums of a dozen numbers near 1


def invented(seed: int) -> tuple[dict[str, float], LinearTimes]:
    """Ten linears, most of them faster in 8 bits, with errors that do not follow their times; one of them errs nothing."""
    draw = random.Random(seed)
    errors = {f"linear {index}": draw.uniform(0.001, 0.1) for index in range(9)} | {"exact": 0.0}
    seconds = {name: Seconds(took := draw.uniform(0.5, 3), took * draw.uniform(0.4, 1.1)) for name in errors}
    return errors, LinearTimes(seconds, "an invented device", "bfloat16")


def removed(errors: dict[str, float], kept: tuple[str, ...] | list[str]) -> float:
    return sum(errors[name] ** 2 for name in kept)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_against_every_other_one(seed: int) -> None:
    errors, times = invented(seed)
    idle = times.no_faster()
    lowest = times.share(idle)
    everything = [subset for count in range(11) for subset in itertools.combinations(errors, count)]
    assert min(times.share(subset) for subset in everything) == pytest.approx(lowest, rel=ROUNDING)
    left = [predicted_error(errors)]
    for step in range(20):
        target = lowest + (0.9999 - lowest) * step / 19
        kept = float_layers_in_time(errors, times, target)
        assert times.share(kept) <= target
        assert set(idle) <= set(kept)
        assert "exact" in idle or "exact" not in kept
        out = [name for name in errors if name not in kept and errors[name]]
        # As many as fit.
        assert all(times.share([*kept, name]) > target for name in out)

        def gain(name: str) -> float:
            return errors[name] ** 2 / (times.seconds[name].floating - times.seconds[name].quantised)

        # Whatever was left out did not fit beside those that remove more per second; so every kept one beats what still fitted.
        for name in out:
            better = [other for other in kept if other in idle or gain(other) >= gain(name)]
            assert times.share([*better, name]) > target
        best = max(removed(errors, subset) for subset in everything if times.share(subset) <= target)
        at_most = removed(errors, kept) + max((errors[name] ** 2 for name in out), default=0.0)
        assert removed(errors, kept) <= best + ROUNDING
        assert best <= at_most + ROUNDING
        # A larger target never leaves more error.
        left.append(predicted_error({name: error for name, error in errors.items() if name not in kept}))
        assert left[-1] <= left[-2] + ROUNDING
    # Just below 1, where one linear has to stay in 8 bits, it is the one whose error is smallest for its time.
    assert len([name for name in errors if name not in kept and errors[name]]) <= 1


def test_a_target_that_cannot_be_is_refused_with_what_can() -> None:
    seconds = {"a": Seconds(2.0, 1.0), "b": Seconds(1.0, 1.5), "c": Seconds(1.0, 0.5)}
    times = LinearTimes(seconds, "an invented device", "bfloat16")
    errors = dict.fromkeys(seconds, 0.01)
    assert times.share(()) == pytest.approx(0.75)
    assert float_layers_in_time(errors, times, 0.625) == ["b"]
    assert float_layers_in_time(errors, times, 0.75) == ["b", "c"]
    with pytest.raises(ValueError, match=r"target_latency=0.6: .*invented device.* 0.750 .* bfloat16 .* from 0.625"):
        float_layers_in_time(errors, times, 0.6)
    for target in (1, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"target_latency={target:g}: a share .* below 1"):
            float_layers_in_time(errors, times, target)
    slow = LinearTimes({"a": Seconds(1.0, 1.2)}, "an invented device", "bfloat16")
    with pytest.raises(ValueError, match=r"1\.200 .*; 8 bits win no time there: calibrate on"):
        float_layers_in_time({"a": 0.01}, slow, 0.9)


def test_every_use_is_timed_once_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[latency.Use] = []

    def clock(linear: nn.Module, use: latency.Use, scheme: str) -> Seconds:
        assert isinstance(linear, nn.Linear)
        assert (linear.in_features, linear.out_features) == (use.shape[-1], use.out_features)
        timed.append(use)
        # A slower first round does not count.
        return Seconds(2.0, 1.0) if timed.count(use) == 2 else Seconds(9.0, 9.0)

    monkeypatch.setattr(latency, "_time_use", clock)
    model = network(SLA)
    first, second = forward_calls(2)

    def twice(model: nn.Module) -> None:
        first(model)
        second(model)

    times = time_linears(model, [twice], "int8_channel", True)
    assert list(times.seconds) == linear_names(model)
    assert set(times.seconds.values()) == {Seconds(4.0, 2.0)}
    assert times.dtype == "float32"
    assert times.share(()) == 0.5
    uses = {(use.shape, use.out_features, use.gelu, use.smooth) for use in timed}
    assert uses == {
        ((2, 24, 48), 48, False, False),  # attention's
        ((2, 9, 48), 48, False, False),  # cross-attention's k and v, of the text
        ((2, 24, 48), 80, False, False),
        ((2, 24, 80), 48, True, True),
    }
    assert len(timed) == latency.ROUNDS * len(uses)
    assert not any(module._forward_pre_hooks for module in model.modules())
    # Tiles have no vector of their own, nor has a calibration without SmoothQuant.
    for scheme, smoothed in (("int8_block128", True), ("int8_channel", False)):
        timed.clear()
        time_linears(model, [first], scheme, smoothed)
        assert not any(use.smooth for use in timed)


def test_bad_calls() -> None:
    model, calls = network(SLA), forward_calls(1)
    with pytest.raises(ValueError, match="calls is empty"):
        time_linears(model, [], "int8_channel", True)
    with pytest.raises(ValueError, match=r"did not reach blocks\.0\.self_attn\.o"):
        time_linears(model, [lambda model: None], "int8_channel", True)
    with pytest.raises(ValueError, match=r"target_error=0.1, target_latency=0.5: give one"):
        quantize_transformer(model, calls, target_error=0.1, target_latency=0.5)
    quantize_transformer(model, calls)
    with pytest.raises(ValueError, match="quantised already"):
        time_linears(model, calls, "int8_channel", True)


@pytest.mark.parametrize("scheme", ["int8_channel", "int8_block128", "fp8_channel"])
def test_8_bits_save_a_cpu_no_time_in_small_networks(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS_EACH", 1e-3)
    model = network(SLA)
    before = copy.deepcopy(model.state_dict())
    times = time_linears(model, forward_calls(1), scheme, True)
    assert all(took.floating > 0 and took.quantised > 0 for took in times.seconds.values())
    with pytest.raises(ValueError, match=r"target_latency=0\.3: measured on .*; (8 bits win no|choose a target from)"):
        quantize_transformer(model, forward_calls(1), scheme=scheme, target_latency=0.3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_time_is_kept_and_the_report_says_what_led_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plant_outliers(network(SLA))
    calls, held_out = forward_calls(2), forward_calls(2, seed=1)
    names = linear_names(model)
    # ffn linears win most, and one linear nothing.
    seconds = {name: Seconds(3.0, 1.5) if "ffn" in name else Seconds(1.0, 0.8) for name in names}
    seconds["blocks.1.cross_attn.k"] = Seconds(0.1, 0.2)
    times = LinearTimes(seconds, "an invented device", "float32")
    monkeypatch.setattr(export, "time_linears", lambda *_: times)
    whole, mixed = (copy.deepcopy(model) for _ in range(2))
    plain = quantize_transformer(whole, calls, held_out, alphas=())
    report = quantize_transformer(mixed, calls, held_out, alphas=(), target_latency=0.8)
    kept = report.metadata()["kept_float"]
    assert set(kept) == set(float_layers_in_time(report.sensitivity, times, 0.8))
    assert len(kept) > 1
    assert kept["blocks.1.cross_attn.k"] == "8 bits save it no time on an invented device"
    assert sum("wanted 0.8 of the time in float" in reason for reason in kept.values()) == len(kept) - 1
    assert all(isinstance(mixed.get_submodule(name), nn.Linear) for name in kept)
    said = report.metadata()["latency"]
    left = {name: error for name, error in report.sensitivity.items() if name not in kept}
    assert said == {
        "target": 0.8,
        "predicted": times.share(kept),
        "all_quantised": times.share(()),
        "predicted_error": predicted_error(left),
        "device": "an invented device",
        "dtype": "float32",
    }
    assert said["all_quantised"] < said["predicted"] <= 0.8
    assert report.to_dict()["latency"] == {**said, "seconds": {name: list(took) for name, took in seconds.items()}}
    assert report.mean_latent_error is not None
    assert plain.mean_latent_error is not None
    assert report.mean_latent_error < 0.8 * plain.mean_latent_error
    assert plain.metadata()["latency"] is None
