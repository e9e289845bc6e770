"""CUDA graphs, one product for q, k and v, and text encoded once: on a GPU, bit for bit what plain calls give."""

from __future__ import annotations

import gc

import fused_cases as cases
import pytest
import torch
from torch import Tensor
from wan_networks import build, inputs

from turbotrain.model.graphs import GraphCache
from turbotrain.model.quant_linear import prepare_for_inference
from turbotrain.model.wan import WanTransformer

pytestmark = pytest.mark.gpu


def network_of(structure: str, attention: str, scheme: str | None) -> WanTransformer:
    model = build(structure, cases.ATTENTIONS[attention], torch.bfloat16).requires_grad_(False)
    if scheme is not None:
        cases.quantize(model, scheme)
    return model.to("cuda")


def given_to(model: WanTransformer, seed: int) -> dict[str, Tensor]:
    return {name: x.cuda() for name, x in inputs(model.config, torch.bfloat16, grid=cases.GRID, seed=seed).items()}


@pytest.mark.parametrize("scheme", [None, "int8_channel", "int8_block128"])
@pytest.mark.parametrize("attention", ["dense", "cube", "sage_sla"])
@pytest.mark.parametrize("structure", ["i2v_clip", "ti2v_per_token"])
@torch.inference_mode()
def test_replays_equal_plain_calls(structure: str, attention: str, scheme: str | None) -> None:
    model = network_of(structure, attention, scheme)
    seeds = range(4)
    expected = [model(**given_to(model, seed)) for seed in seeds]
    prepare_for_inference(model)
    graphs = GraphCache()
    network = graphs.network(model)
    for seed in seeds:
        given = given_to(model, seed)
        encoded = model.encode_context(given.pop("context_BLD"), given.pop("clip_BLD", None))
        got = network(given.pop("x_BCTHW"), given.pop("timestep"), encoded, **given)
        assert torch.equal(got, expected[seed])
    assert len(graphs) == 1


@torch.inference_mode()
def test_two_networks_share_a_pool_in_any_order() -> None:
    models = [network_of("t2v", "sage_sla", "int8_channel"), network_of("t2v", "dense", None)]
    graphs = GraphCache()
    networks = [graphs.network(model) for model in models]
    results: list[tuple[Tensor, Tensor]] = []
    for seed, turn in enumerate((0, 1, 0, 1, 1, 0, 0, 1)):
        given = given_to(models[turn], seed)
        inputs_of_call = given["x_BCTHW"], given["timestep"], given["context_BLD"]
        results.append((networks[turn](*inputs_of_call), models[turn](*inputs_of_call)))
    assert len(graphs) == 2
    assert all(torch.equal(graphed, plain) for graphed, plain in results)


@torch.inference_mode()
def test_memory_returns_when_graphs_are_cleared() -> None:
    model = network_of("t2v", "sage_sla", "int8_channel")
    graphs, given = GraphCache(), given_to(model, 0)
    inputs_of_call = given["x_BCTHW"], given["timestep"], given["context_BLD"]
    model(*inputs_of_call)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(2):  # a pool that was given back is made anew
        network = graphs.network(model)
        for _ in range(3):
            result = network(*inputs_of_call)
        assert torch.equal(result, model(*inputs_of_call))
        assert len(graphs) == 1
        assert torch.cuda.memory_reserved() > before
        graphs.clear()
        del network, result  # a result that is kept may need a segment of memory that was not there before
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before


@torch.inference_mode()
def test_a_call_that_synchronises_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what comes after it is unharmed: random numbers and graphs of other calls."""
    model = network_of("t2v", "dense", None)
    plain = model._time
    monkeypatch.setattr(model, "_time", lambda timestep, *rest: plain(timestep + 0 * timestep.sum().item(), *rest))
    graphs = GraphCache()
    network = graphs.network(model)
    for seed in range(3):
        given = given_to(model, seed)
        inputs_of_call = given["x_BCTHW"], given["timestep"], given["context_BLD"]
        assert torch.equal(network(*inputs_of_call), model(*inputs_of_call))
    assert len(graphs) == 0
    assert torch.randn(8, device="cuda").isfinite().all()
    monkeypatch.undo()
    other = network_of("t2v", "sage_sla", None)
    network, given = graphs.network(other), given_to(other, 0)
    inputs_of_call = given["x_BCTHW"], given["timestep"], given["context_BLD"]
    for _ in range(3):
        assert torch.equal(network(*inputs_of_call), other(*inputs_of_call))
    assert len(graphs) == 1
