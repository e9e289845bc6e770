"""Folding a smoothing vector changes where numbers are large, never what the network computes."""

from __future__ import annotations

import copy

import pytest
import torch
from quant_networks import SLA, forward_calls, network, relative
from torch import nn

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.quant import SITES, fold, model_sites
from turbotrain.quant.sites import PROJECTION, block_linears, block_sites

NETWORKS = {
    "dense": (AttentionConfig(), None),
    "sla": (SLA, None),
    "image_tokens": (AttentionConfig(), 24),
}
FOLDED = [site for site in SITES if site.fold not in ("none", "layer")]


def vector_for(model: nn.Module, fold_kind: str) -> torch.Tensor:
    n = 16 if fold_kind == "values" else 48  # a head, or the width
    return torch.exp(torch.randn(n, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("site", FOLDED, ids=lambda site: site.linears[0])
@torch.no_grad()
def test_each_fold_leaves_the_function_alone(kind: str, site) -> None:
    attention, image_dim = NETWORKS[kind]
    model = network(attention, image_dim=image_dim)
    smoothed = copy.deepcopy(model)
    for block in smoothed.blocks:
        fold(block, site, vector_for(model, site.fold))
    for call in forward_calls(2, image_dim=image_dim):
        assert relative(call(smoothed), call(model)) < 1e-5
    changed = [
        name
        for name, tensor in smoothed.state_dict().items()
        if not torch.equal(tensor, model.state_dict().get(name, tensor))
    ]
    assert changed  # the equality above is not that of two untouched networks


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_all_folds_together_leave_the_function_alone_and_divide_the_inputs(kind: str) -> None:
    attention, image_dim = NETWORKS[kind]
    model = network(attention, image_dim=image_dim)
    smoothed = copy.deepcopy(model)
    for _, block, site in model_sites(smoothed):
        if site in FOLDED:
            fold(block, site, vector_for(model, site.fold))
    (call,) = forward_calls(1, image_dim=image_dim)

    def inputs_of(which: nn.Module) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        handles = [
            which.get_submodule(f"{name}.{site.linears[0]}").register_forward_pre_hook(
                lambda module, args, key=(f"{name}.{site.linears[0]}"): seen.__setitem__(key, args[0])
            )
            for name, _, site in model_sites(which)
        ]
        seen["out"] = call(which)
        for handle in handles:
            handle.remove()
        return seen

    before, after = inputs_of(model), inputs_of(smoothed)
    assert relative(after["out"], before["out"]) < 1e-5
    for name, _, site in model_sites(model):
        key = f"{name}.{site.linears[0]}"
        vector = vector_for(model, site.fold)
        divisor = vector.repeat(before[key].shape[-1] // len(vector)) if site in FOLDED else 1.0
        assert relative(after[key], before[key] / divisor) < 1e-5


@torch.no_grad()
def test_sla_would_notice_an_unfolded_projection() -> None:
    """P mixes the features of a head: scaling v alone changes the function, so the test above can fail."""
    model = network(SLA)
    smoothed = copy.deepcopy(model)
    for block, original in zip(smoothed.blocks, model.blocks):
        fold(block, SITES[0], vector_for(model, "values"))
        block.get_submodule(PROJECTION).load_state_dict(original.get_submodule(PROJECTION).state_dict())
    (call,) = forward_calls(1)
    assert relative(call(smoothed), call(model)) > 1e-2


def test_every_block_linear_but_p_has_one_site() -> None:
    for attention, image_dim in NETWORKS.values():
        block = network(attention, image_dim=image_dim).blocks[0]
        names = [name for site in block_sites(block) for name in site.linears]
        assert sorted(names) == sorted(block_linears(block))
        assert len(names) == (12 if image_dim else 10)
        assert not any("proj_l" in name for name in names)


def test_unknown_linears_and_models_are_named() -> None:
    model = network()
    model.blocks[1].add_module("gate", nn.Linear(48, 48))
    with pytest.raises(ValueError, match="gate"):
        list(model_sites(model))
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        list(model_sites(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="from_linear"):
        fold(network().blocks[0], SITES[-1], torch.ones(80))
