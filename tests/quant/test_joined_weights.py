"""q, k and v of 8 bits as one product: bit for bit what three give, and nothing of it shows from outside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from turbokernels.w8a8.api import SCHEMES

from turbotrain.model import quant_linear
from turbotrain.model.quant_linear import QuantLinear, multiply_together, prepare_for_inference, quantize_for
from turbotrain.model.tangent import Quantized
from turbotrain.model.variants import WanConfig
from turbotrain.model.wan import WanTransformer

CONFIG = WanConfig(
    dim=256, ffn_dim=128, num_heads=2, num_layers=1, in_channels=4, out_channels=4, text_dim=16, text_len=5
)
NAMES = ("self_attn.q", "self_attn.k", "self_attn.v")


def quantised(scheme: str, bias: bool = True) -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(CONFIG)
    for name in NAMES:
        linear = nn.Linear(CONFIG.dim, CONFIG.dim, bias=bias)
        model.blocks[0].set_submodule(name, QuantLinear.from_linear(linear, scheme))
    return model.requires_grad_(False).eval()


def layers_of(model: WanTransformer) -> list[QuantLinear]:
    return [model.blocks[0].get_submodule(name) for name in NAMES]


def read(scheme: str) -> Quantized:
    x = quantize_for(scheme, torch.randn(2, 7, CONFIG.dim).bfloat16())
    assert isinstance(x, Quantized)
    return x


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_one_product_gives_what_three_give(scheme: str, bias: bool) -> None:
    model, x = quantised(scheme, bias), read(scheme)
    apart = [layer(x) for layer in layers_of(model)]
    assert multiply_together(layers_of(model), x) is None
    together = multiply_together(layers_of(prepare_for_inference(model)), x)
    assert together is not None
    for a, b in zip(apart, together):
        assert a.dtype == b.dtype
        assert torch.equal(a, b) if scheme.startswith("int8") else torch.allclose(a, b, atol=0, rtol=2**-7)


@torch.no_grad()
def test_names_values_and_bytes_stay() -> None:
    model = quantised("int8_channel")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_for_inference(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    weights = {name: layer.weight_q for name, layer in zip(NAMES, layers_of(model))}
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights.values()}
    assert list(storages.values()) == [3 * CONFIG.dim**2]
    addresses = [weight.data_ptr() for weight in weights.values()]
    prepare_for_inference(model)  # once is enough
    assert [layer.weight_q.data_ptr() for layer in layers_of(model)] == addresses


@torch.no_grad()
def test_the_network_multiplies_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    product = quant_linear.w8a8_linear

    def counted(x, weight_q, *rest, **named):
        shapes.append(tuple(weight_q.shape))
        return product(x, weight_q, *rest, **named)

    monkeypatch.setattr(quant_linear, "w8a8_linear", counted)
    model = quantised("int8_channel")
    given = (torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 16))
    expected = model(*given)
    assert shapes == [(256, 256)] * 3
    shapes.clear()
    assert torch.equal(prepare_for_inference(model)(*given), expected)
    assert shapes == [(768, 256)]


@torch.no_grad()
def test_moved_or_replaced_weights_are_multiplied_one_by_one() -> None:
    """What else would happen: a product with weights of before."""
    x = read("int8_channel")
    for change in ("moved", "replaced"):
        model = prepare_for_inference(quantised("int8_channel"))
        layers = layers_of(model)
        if change == "moved":
            for layer in layers:
                layer._apply(torch.clone)
        else:
            layers[1].weight_q = -layers[1].weight_q
        assert multiply_together(layers, x) is None, change
    twin = copy.deepcopy(prepare_for_inference(quantised("int8_channel")))
    layers_of(twin)[1].weight_q.neg_()  # written in place: read in place
    expected = [layer(x) for layer in layers_of(twin)]
    together = multiply_together(layers_of(twin), x)
    assert together is not None
    assert all(torch.equal(a, b) for a, b in zip(expected, together))


@torch.no_grad()
def test_what_cannot_lie_together_stays() -> None:
    model = quantised("int8_channel")
    model.blocks[0].set_submodule("self_attn.k", nn.Linear(CONFIG.dim, CONFIG.dim))
    mixed = copy.deepcopy(model)
    prepare_for_inference(mixed)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), mixed.state_dict().values()))
    assert multiply_together(layers_of(mixed), read("int8_channel")) is None
