"""Inference, which runs turbokernels' fused operators, against the plain path of training; and as one compiled graph."""

from __future__ import annotations

import fused_cases as cases
import pytest
import torch
import torch._dynamo  # tells torch's functions apart by identity: it must meet them before a test replaces one
from torch import nn
from wan_networks import STRUCTURES, build, inputs, relative

from turbotrain.model import elementwise
from turbotrain.model.quant_linear import QuantLinear, common_scheme
from turbotrain.model.tangent import Dual, Quantized

SCHEMES = ("int8_channel", "fp8_channel", "int8_block128")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("attention", ["dense", "sla", "cube"])
def test_float32_is_the_plain_path(structure: str, attention: str) -> None:
    fused, plain, _ = cases.fused_plain_exact(structure, attention, None, torch.float32, "cpu")
    assert relative(fused, plain) < 1e-6


@pytest.mark.parametrize("structure", ["i2v_clip", "ti2v_per_token"])
@pytest.mark.parametrize("attention", cases.ATTENTIONS)
def test_bfloat16_is_as_accurate(structure: str, attention: str) -> None:
    cases.check(structure, attention, None, torch.bfloat16, "cpu", smoothed=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("structure", ["i2v_clip", "ti2v_per_token"])
def test_quantised_is_as_accurate(structure: str, scheme: str, dtype: torch.dtype) -> None:
    cases.check(structure, "sla", scheme, dtype, "cpu")
    cases.check(structure, "dense", scheme, dtype, "cpu", smoothed=True)


@pytest.mark.parametrize("keep", [("self_attn.k",), ("cross_attn.q", "ffn.2"), ("ffn.0", "cross_attn.v")])
def test_linears_that_stay_float_read_floats(keep: tuple[str, ...]) -> None:
    cases.check("t2v", "sla", "int8_channel", torch.bfloat16, "cpu", keep=keep)


@torch.no_grad()
def test_readers_share_one_quantisation() -> None:
    """q, k and v are handed the same 8-bit values."""
    model = build(dtype=torch.bfloat16)
    cases.quantize(model, "int8_channel")
    seen: dict[str, object] = {}
    for name, layer in model.blocks[0].named_modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    model(**inputs(model.config, torch.bfloat16))
    of = {name: type(given) for name, given in seen.items()}
    quantised = {"self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q", "cross_attn.k", "cross_attn.v", "ffn.0"}
    assert {name for name, kind in of.items() if kind is Quantized} == quantised
    assert seen["self_attn.q"] is seen["self_attn.v"]
    assert seen["cross_attn.k"] is seen["cross_attn.v"]


def test_common_scheme() -> None:
    linear = nn.Linear(8, 8)
    int8, fp8 = (QuantLinear.from_linear(linear, scheme) for scheme in SCHEMES[:2])
    divides = QuantLinear.from_linear(linear, "int8_channel", torch.ones(8))
    assert common_scheme([int8, int8]) == "int8_channel"
    assert [common_scheme(pair) for pair in ([int8, fp8], [int8, linear], [int8, divides], [linear])] == [None] * 4


def test_gradients_and_tangents_take_the_plain_path() -> None:
    x, norm = Dual(torch.randn(1, 3, 8)), elementwise.Norm(*(Dual(torch.randn(1, 1, 8)) for _ in range(2)), eps=1e-6)
    with torch.no_grad():
        slope = elementwise.norm(Dual(x.x, torch.randn(1, 3, 8)), norm, ())
    assert isinstance(slope, Dual)
    assert slope.t is not None
    leaf = x.x.clone().requires_grad_()
    out, h = elementwise.residual_norm(Dual(leaf), x, None, norm, ())
    assert isinstance(h, Dual)
    (out.x.sum() + h.x.square().sum()).backward()
    assert leaf.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "int8_channel"])
def test_inference_compiles_into_one_graph(scheme: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler must see the real torch.empty_like
    model = build("i2v_clip", cases.ATTENTIONS["cube"])
    if scheme is not None:
        cases.quantize(model, scheme)
    given = inputs(model.config, grid=cases.GRID)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert relative(compiled(**given), model(**given)) < 1e-5
