"""Fine-tuning of quantised weights on a GPU: the int8 kernels multiply, gradients are theirs, and held-out inputs gain."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from quant_networks import SLA, forward_calls, network
from torch import Tensor, nn
from turbokernels.testing import assert_within_budget
from turbokernels.w8a8 import kernel
from turbokernels.w8a8.api import quantize_weight

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import QuantLinear, quantize_for
from turbotrain.model.tangent import Quantized
from turbotrain.quant import Finetune, latent_error, quantize_transformer
from turbotrain.quant.finetune import TrainedQuantLinear

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The schemes of the W8A8 kernels' launches."""
    launched: list[str] = []
    multiply = kernel.w8a8_linear

    def noting(*operands: Any) -> Tensor:
        launched.append(operands[4])
        return multiply(*operands)

    monkeypatch.setattr(kernel, "w8a8_linear", noting)
    return launched


def exact_hats(linear: nn.Linear, x_BLK: Tensor, smooth_K: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """In float64 the activations and the weight that 8 bits hold, both as they are multiplied."""
    quantised = quantize_for(scheme, x_BLK / smooth_K)
    assert isinstance(quantised, Quantized)
    weight_q, weight_scale = quantize_weight(linear.weight.detach() * smooth_K, scheme)

    def wide(values: Tensor, scale: Tensor) -> Tensor:
        if scheme == "int8_channel":
            return values.double() * scale.double()[..., None]
        tiles = scale.double().repeat_interleave(128, -2).repeat_interleave(128, -1)
        return values.double() * tiles[..., : values.shape[-2], : values.shape[-1]]

    return wide(quantised.values, quantised.scale), wide(weight_q, weight_scale)


@pytest.mark.parametrize("scheme", ["int8_channel", "int8_block128"])
def test_products_are_those_of_inference(scheme: str, products: list[str]) -> None:
    linear, x_BLK = nn.Linear(200, 140).to("cuda"), torch.randn(2, 150, 200, device="cuda")
    trained = TrainedQuantLinear(linear, scheme)(x_BLK)
    assert products == [scheme]
    with torch.no_grad():
        assert torch.equal(trained, QuantLinear.from_linear(linear, scheme)(x_BLK))


@pytest.mark.parametrize("scheme", ["int8_channel", "int8_block128"])
def test_gradients_are_those_of_the_values_that_8_bits_hold(scheme: str, products: list[str]) -> None:
    linear, smooth_K = nn.Linear(200, 140), torch.rand(200) + 0.5
    x_BLK, dy_BLN = torch.randn(2, 150, 200), torch.randn(2, 150, 140)

    def gradients(device: str) -> list[Tensor]:
        layer = TrainedQuantLinear(copy.deepcopy(linear).to(device), scheme, smooth_K.to(device))
        x = x_BLK.to(device).requires_grad_()
        found = torch.autograd.grad(layer(x), (x, *layer.parameters()), dy_BLN.to(device))
        return [gradient.cpu() for gradient in found]

    got = gradients("cuda")
    assert products == [scheme]
    x_hat_BLK, weight_hat_NK = exact_hats(linear, x_BLK, smooth_K, scheme)
    dy, smooth = dy_BLN.double(), smooth_K.double()
    exact = [dy @ weight_hat_NK / smooth, torch.einsum("bln,blk->nk", dy, x_hat_BLK) * smooth, dy.sum((0, 1))]
    for name, found, plain, wanted in zip(("input", "weight", "bias"), got, gradients("cpu"), exact, strict=True):
        assert_within_budget(found, plain, wanted, name)


@pytest.mark.parametrize(
    ("scheme", "attention", "dtype"),
    [
        ("int8_channel", None, torch.float32),
        ("int8_channel", None, torch.bfloat16),
        ("int8_channel", SLA, torch.float32),
        ("int8_block128", None, torch.float32),
    ],
    ids=["channel", "channel_bf16", "channel_sla", "block128"],
)
def test_tuned_weights_err_less_on_inputs_that_they_never_saw(
    scheme: str, attention: AttentionConfig | None, dtype: torch.dtype, products: list[str]
) -> None:
    model = network(attention).set_weight_dtype(dtype).to("cuda")
    held_out = forward_calls(4, seed=5, device="cuda")
    with torch.no_grad():
        floating = [call(model) for call in held_out]
    tuning = Finetune(forward_calls(24, seed=9, device="cuda"), steps=20, lr=3e-5, batch_size=4)
    calls = forward_calls(2, device="cuda")
    report = quantize_transformer(model, calls, held_out, scheme=scheme, alphas=(0.5,), finetune=tuning)
    said = report.finetune
    assert said is not None
    assert said["kept"]
    assert said["latent_error_after"] < said["latent_error_before"]
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert len(layers) == 20
    assert all(buffer.is_cuda for buffer in model.buffers())
    assert set(products) == {scheme}
    assert len(products) > tuning.steps * len(layers)
    # What came out is what was judged.
    with torch.no_grad():
        errors = [latent_error(call(model), before) for call, before in zip(held_out, floating, strict=True)]
    assert statistics.median(errors) == pytest.approx(said["latent_error_after"], rel=1e-3)
