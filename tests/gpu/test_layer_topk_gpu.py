"""Top-k by layer on a GPU: kernels against the reference, graphs, compiled code, and a pipeline that was saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SHAPES, random_network, write_checkpoint
from torch import Tensor
from turbokernels import dispatch
from turbokernels.blocks import BlockMask
from turbokernels.testing import assert_within_budget
from wan_networks import build, inputs

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.graphs import GraphCache
from turbotrain.model.wan import WanTransformer
from turbotrain.pipeline import TurboPipeline

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]
GRID = (3, 10, 12)  # 90 tokens: six blocks of 16, the last one ragged
TOPKS = (0.7, 0.2)
KEPT = [4, 1]  # of the six
SLA_OPS = {"select_blocks", "sparse_attention", "add_linear_attention"}


def by_layer(kind: str = "sla", topks: tuple[float, ...] = TOPKS) -> AttentionConfig:
    return AttentionConfig(kind, block_q=16, block_k=16, layer_topk=topks)


def given_to(model: WanTransformer, seed: int = 1) -> dict[str, Tensor]:
    given = inputs(model.config, model.dtype, grid=GRID, seed=seed)
    return {name: value.to(model.device) for name, value in given.items()}


def in_float64(model: WanTransformer, given: dict[str, Tensor]) -> tuple[WanTransformer, dict[str, Tensor]]:
    double = {name: value.double() for name, value in given.items()}
    return copy.deepcopy(model).set_weight_dtype(torch.float64), double


def plain(op: str, impl: str, device: torch.device, table: dict[str, Any]) -> Any:
    """In place of `dispatch.choose`: every operator in plain PyTorch."""
    return table["reference"]


def velocity_and_gradient(
    model: WanTransformer, given: dict[str, Tensor], selection: list[BlockMask] | None = None
) -> tuple[Tensor, dict[str, Tensor], list[BlockMask]]:
    model.zero_grad(set_to_none=True)
    v, chosen = model(**given, selection=selection, return_selection=True)
    v.square().sum().backward()
    return v.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, chosen


def together(gradient: dict[str, Tensor], like: dict[str, Tensor]) -> Tensor:
    """One vector in which every parameter counts alike: each relative to the size of `like`'s."""
    parts = [(gradient[name].double() / exact.square().mean().sqrt()).flatten() for name, exact in like.items()]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_give_the_references_velocity_and_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, launched = dispatch.choose, set()

    def noting(op: str, impl: str, device: torch.device, table: dict[str, Any]) -> Any:
        run = choose(op, impl, device, table)
        launched.update({op} if run is not table["reference"] else ())
        return run

    model = build("t2v", by_layer(), dtype).to("cuda")
    given = given_to(model)
    monkeypatch.setattr(dispatch, "choose", noting)
    v, gradient, selection = velocity_and_gradient(model, given)
    assert launched >= SLA_OPS
    assert [mask.n_kept for mask in selection] == KEPT
    monkeypatch.setattr(dispatch, "choose", plain)
    plain_v, plain_gradient, _ = velocity_and_gradient(model, given, selection)
    exact_v, exact, _ = velocity_and_gradient(*in_float64(model, given), selection)
    assert_within_budget(v, plain_v, exact_v, "velocity")
    assert gradient.keys() == exact.keys()
    vectors = [together(found, exact) for found in (gradient, plain_gradient, exact)]
    assert_within_budget(*vectors, "gradient")


@pytest.mark.parametrize("kind", ["sla", "sage_sla"])
@torch.inference_mode()
def test_graphs_of_other_topks_are_other_graphs(kind: str) -> None:
    model = build("t2v", by_layer(kind), torch.bfloat16).requires_grad_(False).to("cuda")
    graphs, results = GraphCache(), []
    # The same mean, and back again: replays from the first call on.
    for topks in (TOPKS, TOPKS[::-1], TOPKS):
        network = graphs.network(model.set_attention(by_layer(kind, topks)))
        for seed in range(3):
            given = given_to(model, seed)
            inputs_of_call = given["x_BCTHW"], given["timestep"], given["context_BLD"]
            results.append(network(*inputs_of_call))
            expected, selection = model(*inputs_of_call, return_selection=True)
            assert torch.equal(results[-1], expected)
            assert [mask.n_kept for mask in selection] == KEPT[:: 1 if topks == TOPKS else -1]
    assert len(graphs) == 2
    assert torch.equal(results[0], results[6])
    assert not torch.equal(results[0], results[3])


@torch.no_grad()
def test_compiled_passes_are_as_accurate_as_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph with a top-k of every layer's own, CUDA graphs included; three calls, of which the third replays."""
    monkeypatch.undo()  # the compiler must see the real torch.empty
    model = build("t2v", by_layer()).to("cuda")
    given = given_to(model)
    eager, selection = model(**given, return_selection=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        result = compiled(**given).clone()
    monkeypatch.setattr(dispatch, "choose", plain)
    double, wide = in_float64(model, given)
    assert_within_budget(result, eager, double(**wide, selection=selection))


@pytest.mark.parametrize("kind", ["sla", "sage_sla"])
def test_a_pipeline_samples_the_same_once_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    topks = (0.5, 0.125, 0.25, 0.125)
    folder = write_checkpoint(tmp_path / "turbo", kind, layer_topk=topks)
    loaded = TurboPipeline.from_checkpoint(folder, device="cuda", dtype=torch.float32)
    (network,) = loaded.experts
    assert network.attention_config.layer_topk == topks

    def sample(network: torch.nn.Module) -> Tensor:
        pipe = loaded.with_networks([network])
        return pipe.sample(pipe.encode_prompts(["a red circle"]), [3], pipe.latent_shape())

    never_saved = random_network(SHAPES.config, network.attention_config).to("cuda")
    latents_BCTHW = sample(never_saved)
    assert torch.equal(sample(network), latents_BCTHW)
    one_for_all = AttentionConfig(kind, topk=0.25, block_q=32, block_k=32)
    assert not torch.equal(sample(never_saved.set_attention(one_for_all)), latents_BCTHW)
