"""QuantLinear, its names in files, and the way there and back for a whole network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from turbokernels.w8a8.api import SCHEMES, quantize_weight, w8a8_linear

from turbotrain.model.quant_linear import (
    QuantLinear,
    dequantize_model,
    from_disk_names,
    prepare_quantized,
    quantized_layers,
    replace_linears,
    to_disk_names,
)

FIXTURES = Path(os.environ.get("TURBOTRAIN_FIXTURES", Path(__file__).parents[2].parent / "shared")) / "fixtures"


class Block(nn.Module):
    """The names that a Wan block gives its linears and smoothing vectors, and nothing else."""

    smooth_attn: torch.Tensor | None
    smooth_ffn: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(12, 12) for name in "qkv"})
        self.ffn = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12, bias=False))
        self.register_buffer("smooth_attn", None)
        self.register_buffer("smooth_ffn", None)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("smoothed", [False, True])
def test_from_linear_computes_the_op_and_its_weight_is_near(scheme: str, smoothed: bool) -> None:
    linear = nn.Linear(40, 16)
    smooth = torch.rand(40) + 0.5 if smoothed else None
    layer = QuantLinear.from_linear(linear, scheme, smooth)
    x = torch.randn(2, 3, 40)
    with torch.no_grad():
        divided = x if smooth is None else x / smooth
        assert torch.equal(layer(x), w8a8_linear(divided, layer.weight_q, layer.scale, linear.bias, scheme))
        float_y = linear(x)
        assert (layer(x) - float_y).norm() < 0.06 * float_y.norm()
    # Half a step of the coarsest row or tile, or of fp8's 3 mantissa bits.
    scaled = linear.weight.detach() * (1 if smooth is None else smooth)
    step = (
        scaled.abs() * 2**-4 + scaled.abs().max() * 2**-9 if scheme == "fp8_channel" else scaled.abs().max() / 127 / 2
    )
    if scheme == "int8_block128":
        step = step * 2.02  # the tile's largest positive value saturates at 127 of 128
    assert ((layer.dequantize() - linear.weight).abs() * (1 if smooth is None else smooth) <= step * (1 + 1e-6)).all()


def test_bf16_input_is_not_rounded_before_quantisation() -> None:
    layer = QuantLinear.from_linear(nn.Linear(40, 16).bfloat16(), "int8_channel", torch.rand(40) + 0.5)
    x = torch.randn(3, 40).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.float()).bfloat16())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_casting_the_module_keeps_scales_and_values(scheme: str) -> None:
    layer = QuantLinear.from_linear(nn.Linear(40, 16), scheme, torch.rand(40) + 0.5)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.to(torch.bfloat16)
    for name, tensor in layer.named_buffers():
        if name == "bias":
            assert tensor.dtype == torch.bfloat16
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor.float(), before[name].float())
    assert layer.to("meta").weight_q.is_meta
    assert layer.to_empty(device="cpu").scale.dtype == torch.float32


def test_gradients_are_refused() -> None:
    layer = QuantLinear.from_linear(nn.Linear(8, 8), "int8_channel")
    with pytest.raises(ValueError, match="inference"):
        layer(torch.ones(2, 8, requires_grad=True))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_strict_reload(scheme: str, device: str) -> None:
    source = Block()
    source.ffn[0] = QuantLinear.from_linear(source.ffn[0], scheme)
    source.ffn[2] = QuantLinear.from_linear(source.ffn[2], scheme, torch.rand(20) + 0.5)
    source.smooth_ffn = torch.rand(12) + 0.5
    disk = to_disk_names(source.state_dict())
    suffix = "fp8_weight" if scheme == "fp8_channel" else "int8_weight"
    assert {f"ffn.0.{suffix}", "ffn.0.scale", "ffn.0.bias", "ffn.2.smooth", "smooth_ffn"} <= set(disk)
    assert "ffn.2.bias" not in disk

    state = from_disk_names(disk)
    assert quantized_layers(state) == ({"ffn.0": scheme, "ffn.2": scheme}, {"ffn.2"})
    with torch.device(device):
        empty = Block()
    loaded = prepare_quantized(empty, state)
    loaded.load_state_dict(state, strict=True, assign=True)
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].float(), tensor.float())
    assert loaded.ffn[2].scheme == scheme


def test_float_state_dicts_pass_untouched() -> None:
    source = Block()
    state = from_disk_names(to_disk_names(source.state_dict()))
    assert list(state) == list(source.state_dict())
    prepare_quantized(source, state)
    assert all(not isinstance(module, QuantLinear) for module in source.modules())


def test_dequantize_model_folds_the_vectors_back() -> None:
    block = Block()
    weights = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    smooth_attn, smooth_ffn = torch.rand(12) + 0.5, torch.rand(12) + 0.5
    with torch.no_grad():
        block.ffn[0].weight *= smooth_ffn
        for name in "qkv":
            block.self_attn[name].weight *= smooth_attn
    block.smooth_attn, block.smooth_ffn = smooth_attn, smooth_ffn
    for name in "qk":  # v stays a float layer, as one below min_sqnr_db does
        block.self_attn[name] = QuantLinear.from_linear(block.self_attn[name], "int8_channel")
    block.ffn[0] = QuantLinear.from_linear(block.ffn[0], "int8_channel")
    block.ffn[2] = QuantLinear.from_linear(block.ffn[2], "int8_channel", torch.rand(20) + 0.5)

    dequantize_model(block, torch.float32)
    state = block.state_dict()
    assert list(state) == list(weights)
    for name, weight in weights.items():
        exact = name == "self_attn.v.weight"
        assert (state[name] - weight).norm() <= (1e-6 if exact else 0.01) * weight.norm()
    assert all(parameter.requires_grad for parameter in block.parameters())


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no fixtures at {FIXTURES}; set TURBOTRAIN_FIXTURES to their parent")
def test_published_quantised_file() -> None:
    """Our reading of `-quant.pth` gives the dense network it was made from, to the rounding of its 8 bits."""
    quantised = torch.load(FIXTURES / "t2v_quant.pth", weights_only=True)
    dense = torch.load(FIXTURES / "t2v_dense.pth", weights_only=True)
    state = from_disk_names(quantised)
    layers, smoothed = quantized_layers(state)
    assert len(layers) == 20
    assert set(layers.values()) == {"int8_block128"}
    assert not smoothed
    for name in layers:
        weight = dense[f"{name}.weight"].float()
        layer = QuantLinear(weight.shape[1], weight.shape[0], "int8_block128", dtype=state[f"{name}.bias"].dtype)
        layer.load_state_dict({key: state[f"{name}.{key}"] for key in ("weight_q", "scale", "bias")}, strict=True)
        tile_scale = layer.scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert ((layer.dequantize() - weight).abs() <= tile_scale * 1.001).all()
        # Our own quantiser writes the same file from the same weights, but for exact halves: it rounds the correctly
        # rounded quotient, the fixture a product with a rounded reciprocal.
        values, scale = quantize_weight(weight, "int8_block128")
        assert torch.equal(scale, layer.scale)
        is_half = (weight / tile_scale).abs().frac() == 0.5
        assert torch.equal(values[~is_half], layer.weight_q[~is_half])
        assert (values.int() - layer.weight_q.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QuantLinear(4, 4, "int4"), "int8_channel"),
        (lambda: replace_linears(Block(), {"ffn.9": "int8_channel"}), r"ffn\.9.*nothing of that name"),
        (lambda: replace_linears(Block(), {"ffn.1": "int8_channel"}), r"ffn\.1.*GELU"),
        (lambda: replace_linears(Block(), {"ffn.0": "int8_channel"}, {"ffn.2"}), "no scheme"),
        (lambda: quantized_layers({"a.weight_q": torch.ones(4, 4, dtype=torch.int8)}), r"a\.scale"),
        (
            lambda: quantized_layers({"a.weight_q": torch.ones(4, 4, dtype=torch.int8), "a.scale": torch.ones(3)}),
            r"\(3,\).*\(4,\)",
        ),
        (lambda: from_disk_names({"a.int8_weight": torch.ones(4, 4)}), "float32"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
