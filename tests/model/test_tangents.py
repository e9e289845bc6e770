"""Explicit tangents against forward-mode AD of the whole network and central differences, in float64."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from wan_networks import STRUCTURES, build, inputs, relative, tangents_of

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.wan import WanTransformer

SLA = AttentionConfig("sla", topk=0.5, block_q=16, block_k=16)
ATTENTIONS = {"dense": AttentionConfig(), "sla": SLA, "sla_cube": AttentionConfig("sla", 0.5, 16, 16, "cube")}
GRID = (3, 6, 8)  # 36 tokens: three blocks of 16, the last one ragged


def central_difference(
    model: WanTransformer, given: dict[str, Any], tangents: tuple[Tensor, Tensor], selection: Any
) -> Tensor:
    h = 1e-5

    def at(step: float) -> Tensor:
        moved = {
            **given,
            "x_BCTHW": given["x_BCTHW"] + step * tangents[0],
            "timestep": given["timestep"] + step * tangents[1],
        }
        return model(**moved, selection=selection)

    with torch.no_grad():
        return (at(h) - at(-h)) / (2 * h)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_dense_tangent_equals_forward_ad(structure: str) -> None:
    model = build(structure, dtype=torch.float64)
    given = inputs(model.config, torch.float64)
    tangents = tangents_of(given)
    rest = {name: value for name, value in given.items() if name not in ("x_BCTHW", "timestep")}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        v, tv = model(**given, tangents=tangents)
        oracle_v, oracle_tv = torch.func.jvp(
            lambda x, t: model(x, t, **rest), (given["x_BCTHW"], given["timestep"]), tangents
        )
    assert relative(v, oracle_v) < 1e-12
    assert relative(tv, oracle_tv) < 1e-10


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_tangent_equals_central_differences(structure: str, attention: str) -> None:
    model = build(structure, ATTENTIONS[attention], dtype=torch.float64)
    given = inputs(model.config, torch.float64, grid=GRID)
    tangents = tangents_of(given)
    with torch.no_grad():
        v, tv, selection = model(**given, tangents=tangents, return_selection=True)
        assert relative(v, model(**given)) < 1e-12
    assert relative(tv, central_difference(model, given, tangents, selection)) < 1e-7


def test_latent_and_time_directions_add_up() -> None:
    model = build(dtype=torch.float64, attention=SLA)
    given = inputs(model.config, torch.float64, grid=GRID)
    tx, tt = tangents_of(given)
    with torch.no_grad():
        both = model(**given, tangents=(tx, tt))[1]
        latent = model(**given, tangents=(tx, torch.zeros_like(tt)))[1]
        time = model(**given, tangents=(torch.zeros_like(tx), tt))[1]
    assert time.norm() > 1e-3 * both.norm()
    assert relative(latent + time, both) < 1e-12


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradient_of_the_primal_is_unchanged(attention: str, checkpointed: bool) -> None:
    model = build(attention=ATTENTIONS[attention], dtype=torch.float64)
    given = inputs(model.config, torch.float64, grid=GRID)
    weight = torch.randn_like(given["x_BCTHW"])

    def gradients(**options: Any) -> list[Tensor]:
        model.zero_grad()
        out = model(**given, **options)
        v = out[0] if isinstance(out, tuple) else out
        (v * weight).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    assert len(plain) == len(list(model.parameters()))
    model.enable_activation_checkpointing(checkpointed)
    for got, expected in zip(gradients(tangents=tangents_of(given)), plain):
        assert (got - expected).norm() <= 1e-10 * expected.norm() + 1e-13


def test_checkpointed_blocks_keep_no_tangent_for_the_backward_pass() -> None:
    """By the memory that a pass leaves behind: in six layers, less than two values of the stream more than without tangents."""
    model = WanTransformer(dataclasses.replace(STRUCTURES["t2v"], num_layers=6), SLA)
    model.enable_activation_checkpointing()
    given = inputs(model.config, grid=GRID)
    left = []
    for options in ({}, {"tangents": tangents_of(given)}):
        with LiveBytes() as memory:
            out = model(**given, **options)
            gc.collect()
            left.append(memory.live)
        del out
    stream = 2 * 36 * model.config.dim * 4
    assert left[0] > 6 * stream
    assert left[1] - left[0] < 2 * stream


def test_tangent_has_no_graph() -> None:
    model = build(attention=SLA)
    given = inputs(model.config, grid=GRID)
    v, tv = model(**given, tangents=tangents_of(given))
    assert v.requires_grad
    assert not tv.requires_grad


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_float32_tangent_rounds_like_forward_ad(attention: str) -> None:
    """Error to float64 at most twice that of torch.func.jvp through the plain network in float32."""
    exact = build(attention=ATTENTIONS[attention], dtype=torch.float64)
    model = build(attention=ATTENTIONS[attention])
    given64 = inputs(exact.config, torch.float64, grid=GRID)
    given = {name: value.float() for name, value in given64.items()}
    exact_in = {name: value.double() for name, value in given.items()}
    tangents = tuple(tangent.float() for tangent in tangents_of(given64))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        wide = (tangents[0].double(), tangents[1].double())
        _, reference, selection = exact(**exact_in, tangents=wide, return_selection=True)
        _, tv = model(**given, tangents=(tangents[0], tangents[1]), selection=selection)
        dense = build()
        _, plain = torch.func.jvp(
            lambda x, t: dense(x, t, given["context_BLD"]), (given["x_BCTHW"], given["timestep"]), tangents
        )
        dense_exact = build(dtype=torch.float64)(**exact_in, tangents=wide)[1]
    assert relative(tv, reference) < 2 * relative(plain, dense_exact) + torch.finfo(torch.float32).eps


def test_quantized_layers_refuse_tangents_with_the_remedy() -> None:
    from turbotrain.model.quant_linear import QuantLinear

    model = build()
    layer = model.get_submodule("blocks.0.ffn.0")
    model.set_submodule("blocks.0.ffn.0", QuantLinear.from_linear(layer, "int8_channel"))  # type: ignore[arg-type]
    given = inputs(model.config)
    with torch.no_grad(), pytest.raises(ValueError, match="explicit dtype"):
        model(**given, tangents=tangents_of(given))


def test_inference_mode_refuses_tangents() -> None:
    model = build()
    given = inputs(model.config)
    with torch.inference_mode(), pytest.raises(ValueError, match="no_grad"):
        model(**given, tangents=tangents_of(given))
