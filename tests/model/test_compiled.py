"""Element-wise functions of a training pass, compiled, and checkpointed passes that leave out tangents, against plain ones."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_networks import build, inputs, relative, tangents_of

from turbotrain.model import compiled, tangent
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.wan import WanTransformer

SLA = AttentionConfig("sla", topk=0.5, block_q=16, block_k=16)
GRID = (3, 6, 8)


@pytest.fixture
def without_codegen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced and differentiated as for a GPU, then run by PyTorch's own kernels: compilation itself takes a minute."""
    caches = compiled._compiled_value, compiled._compiled_gradient, compiled._compiled_tangent
    monkeypatch.setattr(compiled.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def results(model: WanTransformer, given: dict[str, Any], weight: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    v, tv = model(**given, tangents=tangents_of(given))
    (v * weight).sum().backward()
    return v, tv, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_compiled_passes_compute_the_same(without_codegen: None) -> None:
    model = build(attention=SLA, dtype=torch.float64)
    given = inputs(model.config, torch.float64, grid=GRID)
    weight = torch.randn_like(given["x_BCTHW"])
    v, tv, gradients = results(model, given, weight)
    model.compile_element_wise()
    plain = results(model, given, weight)
    assert compiled._compiled_value.cache_info().currsize > 4
    assert compiled._compiled_gradient.cache_info().currsize > 4
    assert compiled._compiled_tangent.cache_info().currsize > 4
    model.enable_activation_checkpointing()
    for found in (plain, results(model, given, weight)):
        assert relative(found[0], v) < 1e-12
        assert relative(found[1], tv) < 1e-12
        assert found[2].keys() == gradients.keys()
        for name, expected in gradients.items():
            assert (found[2][name] - expected).norm() <= 1e-10 * expected.norm() + 1e-13, name


def test_a_checkpointed_block_is_computed_again_without_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(attention=SLA).enable_activation_checkpointing()
    given = inputs(model.config, grid=GRID)
    v, _ = model(**given, tangents=tangents_of(given))

    def asked(*_: Any) -> Any:
        raise AssertionError("a tangent was computed again")

    monkeypatch.setattr(tangent, "tangent_of", asked)
    v.square().mean().backward()
    assert not tangent.tangents_left_out()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_inference_compiles_nothing(without_codegen: None) -> None:
    model = build().compile_element_wise()
    with torch.no_grad():
        model(**inputs(model.config, grid=GRID))
    assert compiled._compiled_value.cache_info().currsize == 0
