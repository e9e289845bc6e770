"""SLA inside the network: selections, block orders, swapping operators."""

from __future__ import annotations

import pytest
import torch
from wan_networks import build, inputs, relative

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.wan import WanTransformer

GRID = (3, 6, 8)  # 36 tokens


def sla(topk: float = 0.5, order: str = "raster", kind: str = "sla") -> AttentionConfig:
    return AttentionConfig(kind, topk, 16, 16, order)


def zero_projection(model: WanTransformer) -> None:
    for block in model.blocks:
        block.get_submodule("self_attn.attn_op").reset_parameters()  # type: ignore[operator]


@torch.no_grad()
def test_selection_of_all_blocks_with_zero_projection_is_dense_attention() -> None:
    dense = build(dtype=torch.float64)
    given = inputs(dense.config, torch.float64, grid=GRID)
    expected = dense(**given)
    assert relative(dense.set_attention(sla(1.0))(**given), expected) < 1e-12


@torch.no_grad()
def test_new_projection_starts_at_zero_and_matters_once_trained() -> None:
    model = build(attention=sla())
    given = inputs(model.config, grid=GRID)
    trained = model(**given)
    zero_projection(model)
    assert relative(model(**given), trained) > 1e-3
    fresh = build().set_attention(sla())
    assert all(not p.any() for name, p in fresh.named_parameters() if "proj_l" in name)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(3, 6, 8), (2, 8, 8), (1, 10, 6), (5, 2, 4)])
def test_cube_order_equals_raster_when_every_block_is_kept(grid: tuple[int, int, int]) -> None:
    model = build("ti2v_per_token", sla(1.0), torch.float64)
    given = inputs(model.config, torch.float64, grid=grid)
    raster = model(**given)
    assert relative(model.set_attention(sla(1.0, "cube"))(**given), raster) < 1e-12


@torch.no_grad()
def test_block_orders_differ_when_blocks_are_dropped() -> None:
    model = build(attention=sla(0.34))
    given = inputs(model.config, grid=(4, 8, 8))
    raster = model(**given)
    assert relative(model.set_attention(sla(0.34, "cube"))(**given), raster) > 1e-4


@torch.no_grad()
def test_selection_round_trip() -> None:
    model = build(attention=sla(0.34))
    given = inputs(model.config, grid=GRID)
    v, selection = model(**given, return_selection=True)
    assert [mask.kept.shape for mask in selection] == [(2, 3, 3, 1)] * 2
    again, same = model(**given, selection=selection, return_selection=True)
    assert torch.equal(v, again)
    assert all(a is b for a, b in zip(selection, same))
    moved = {**given, "x_BCTHW": given["x_BCTHW"].flip(4)}
    own, other = model(**moved, return_selection=True)
    assert any(not torch.equal(a.kept, b.kept) for a, b in zip(selection, other))
    assert relative(model(**moved, selection=selection), own) > 1e-6
    assert torch.equal(model(**moved, selection=[None, None]), own)


def test_dense_network_returns_an_empty_selection() -> None:
    model = build()
    _, selection = model(**inputs(model.config), return_selection=True)
    assert selection == [None, None]


def test_swapping_operators_keeps_a_trained_projection() -> None:
    model = build(attention=sla())
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.set_attention(sla(0.2, kind="sage_sla")).set_attention(sla(1.0, "cube"))
    assert model.attention_config == sla(1.0, "cube")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.set_attention(AttentionConfig())
    assert set(dict(model.named_parameters())) == {name for name in before if "proj_l" not in name}


def test_projection_stays_float32() -> None:
    model = build(attention=sla(), dtype=torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "proj_l" in name} == {torch.float32}
    given = inputs(model.config, torch.bfloat16, grid=GRID)
    model(**given).sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "proj_l.weight" in name)


def test_sage_is_for_inference_only() -> None:
    model = build(attention=sla(kind="sage_sla"))
    given = inputs(model.config, grid=GRID)
    with pytest.raises(ValueError, match="train with sla"):
        model(**given)
    with torch.no_grad():
        v = model(**given)
        error = relative(v, model.set_attention(sla())(**given))
    assert 0 < error < 0.1
