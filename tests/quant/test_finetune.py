"""Fine-tuning of quantised weights: the arithmetic is inference's, gradients pass rounding, and nothing gets worse in silence."""

from __future__ import annotations

import copy
import json
import math
import statistics

import pytest
import torch
from quant_networks import SLA, forward_calls, network
from torch import nn
from turbokernels.w8a8.api import SCHEMES, dequantize_weight, quantize_weight

from turbotrain.model.quant_linear import QuantLinear, quantize_for
from turbotrain.quant import Finetune, quantize_transformer
from turbotrain.quant.finetune import TrainedQuantLinear, record_passes
from turbotrain.stages.quantize import tuning_line


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("smooth", [False, True])
def test_training_multiplies_as_inference_does(scheme: str, smooth: bool) -> None:
    torch.manual_seed(0)
    linear, x_BLK = nn.Linear(200, 140), torch.randn(2, 150, 200)
    smooth_K = torch.rand(200) + 0.5 if smooth else None
    trained = TrainedQuantLinear(linear, scheme, smooth_K)
    expected_BLN = QuantLinear.from_linear(linear, scheme, smooth_K)(x_BLK)
    assert torch.equal(trained(x_BLK), expected_BLN)
    assert torch.equal(trained.quantised()(x_BLK), expected_BLN)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_through_rounding(scheme: str) -> None:
    torch.manual_seed(0)
    linear, smooth_K = nn.Linear(200, 140), torch.rand(200) + 0.5
    x_BLK, dy_BLN = torch.randn(2, 150, 200, requires_grad=True), torch.randn(2, 150, 140)
    trained = TrainedQuantLinear(linear, scheme, smooth_K)
    trained(x_BLK).backward(dy_BLN)

    # y = x^ W^T + b of the values that 8 bits hold, each differentiated as if rounding had not been there.
    weight_NK = dequantize_weight(*quantize_weight(linear.weight.detach() * smooth_K, scheme), scheme)
    hat_BLK = torch.empty(2, 150, 200)
    for sample in range(2):
        for start in range(0, 150, 128):
            rows = slice(start, start + 128)
            quantised = quantize_for(scheme, x_BLK.detach()[sample, rows] / smooth_K)
            values, scale = quantised[0].float(), quantised[1]
            assert isinstance(scale, torch.Tensor)
            wide = scale.repeat_interleave(128, -1)[..., :200] if scheme == "int8_block128" else scale[:, None]
            hat_BLK[sample, rows] = values * wide
    assert (hat_BLK - x_BLK.detach() / smooth_K).abs().max() > 1e-4, "rounding changes the input"
    torch.testing.assert_close(x_BLK.grad, dy_BLN @ weight_NK / smooth_K)
    torch.testing.assert_close(linear.weight.grad, torch.einsum("bln,blk->nk", dy_BLN, hat_BLK) * smooth_K)
    torch.testing.assert_close(linear.bias.grad, dy_BLN.sum((0, 1)))


@pytest.mark.parametrize(
    ("scheme", "dtype"), [*((scheme, torch.float32) for scheme in SCHEMES), ("int8_channel", torch.bfloat16)]
)
def test_tuned_weights_err_less_on_prompts_that_they_never_saw(scheme: str, dtype: torch.dtype) -> None:
    model = network().set_weight_dtype(dtype)
    plain, held_out = copy.deepcopy(model), forward_calls(4, seed=5)
    trial = quantize_transformer(copy.deepcopy(model), forward_calls(2), scheme=scheme, alphas=(0.5,))
    threshold = sorted(layer.sqnr_db for layer in trial.layers)[1]  # so that one linear stays in float
    options = {"scheme": scheme, "alphas": (0.5,), "min_sqnr_db": threshold}
    without = quantize_transformer(plain, forward_calls(2), held_out, **options)
    tuning = Finetune(forward_calls(24, seed=9), steps=20, lr=3e-5, batch_size=4)
    report = quantize_transformer(model, forward_calls(2), held_out, **options, finetune=tuning)
    said = report.finetune
    assert said is not None
    assert said["kept"]
    assert said["latent_error_before"] == statistics.median(without.latent_errors)
    assert said["latent_error_after"] == statistics.median(report.latent_errors) < said["latent_error_before"]
    assert said["passes"] == 24
    assert json.loads(json.dumps(report.metadata()))["finetune"] == said == report.to_dict()["finetune"]
    assert without.metadata()["finetune"] is None
    # What is quantised has moved; what is not, smoothing vectors among it, has not.
    assert report.layers == without.layers
    before, after = plain.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        tuned = name.endswith(("weight_q", "scale")) or name.removesuffix("bias") + "weight_q" in before
        assert after[name].dtype == value.dtype
        assert tuned or torch.equal(after[name], value), name
    moved = [
        name
        for name in before
        if name.endswith("weight_q") and not torch.equal(before[name].float(), after[name].float())
    ]
    assert len(moved) == len([layer for layer in report.layers if layer.kept_float is None])


def test_weights_that_tuning_made_worse_are_not_kept() -> None:
    model = network(SLA)
    plain = copy.deepcopy(model)
    held_out = forward_calls(2, seed=5)
    without = quantize_transformer(plain, forward_calls(3), held_out)
    tuning = Finetune(forward_calls(3), steps=3, lr=0.5)
    report = quantize_transformer(model, forward_calls(3), held_out, finetune=tuning)
    assert report.finetune is not None
    assert not report.finetune["kept"]
    assert report.latent_errors == without.latent_errors
    assert report.finetune["latent_error_after"] > statistics.median(without.latent_errors)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())


def test_passes_are_those_of_the_network() -> None:
    model, calls = network(image_dim=12), forward_calls(2, image_dim=12)
    first, second = record_passes(model, calls)
    assert len(first.args) == 5
    assert torch.equal(first.velocity, calls[0](model))
    assert torch.equal(second.args[1], torch.tensor([450.0, 250.0]))
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"calls": []}, "calls is empty"),
        ({"steps": 0}, "finetune.steps=0"),
        ({"batch_size": 0}, "finetune.batch_size=0"),
        ({"lr": math.nan}, "finetune.lr=nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Finetune(**{"calls": forward_calls(1), **values})


def test_what_cannot_be_judged_or_tuned_is_refused() -> None:
    tuning = Finetune(forward_calls(1), steps=1)
    with pytest.raises(ValueError, match="held_out is empty"):
        quantize_transformer(network(), forward_calls(1), finetune=tuning)
    with pytest.raises(ValueError, match="nothing to tune"):
        quantize_transformer(network(), forward_calls(1), forward_calls(1, seed=5), min_sqnr_db=199.0, finetune=tuning)


def test_what_came_of_it_is_said_in_a_line() -> None:
    said = {"steps": 3, "latent_error_before": 0.012345678, "latent_error_after": 0.0098765, "kept": True}
    assert tuning_line("", said) == "fine-tuning, 3 steps: median latent error 0.01235 -> 0.00988; kept"
    lost = {**said, "latent_error_after": None, "kept": False}
    assert tuning_line("low", lost).startswith(
        "low-noise expert: fine-tuning, 3 steps: median latent error 0.01235 -> not finite; NOT kept"
    )
