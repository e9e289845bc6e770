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


@torch.no_grad()
def test_layers_take_their_own_topk() -> None:
    model = build(attention=sla(0.3))
    layers = len(model.blocks)
    given = inputs(model.config, grid=GRID)
    before = model(**given)
    assert torch.equal(model.set_attention(sla_by_layer([0.3] * layers))(**given), before)
    topks = [1.0, *[0.3] * (layers - 1)]
    by_layer = model.set_attention(sla_by_layer(topks))(**given)
    assert not torch.equal(by_layer, before)
    model.set_attention(sla(0.3))
    first = model.blocks[0].get_submodule("self_attn.attn_op")
    first.config = sla(1.0)  # type: ignore[assignment]
    assert torch.equal(model(**given), by_layer)
    fresh = WanTransformer(model.config, sla_by_layer(topks))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(**given), by_layer)
    with pytest.raises(ValueError, match=rf"layer_topk has 1 values for {layers} layers"):
        model.set_attention(sla_by_layer([0.3]))


def sla_by_layer(topks: list[float]) -> AttentionConfig:
    return AttentionConfig.from_dict({"layer_topk": topks}, sla())


def test_topk_by_layer_in_words() -> None:
    config = sla_by_layer([0.1, 0.3])
    assert (config.topk, config.layer_topk) == (pytest.approx(0.2), (0.1, 0.3))
    assert AttentionConfig.from_dict(config.to_dict()) == config
    assert hash(config) != hash(sla_by_layer([0.3, 0.1])), "keys of graphs and of work tell them apart"
    assert AttentionConfig.from_dict({"kind": "sage_sla"}, config).layer_topk == (0.1, 0.3)
    assert AttentionConfig.from_dict({"topk": 0.5}, config) == sla(0.5)
    assert AttentionConfig.from_dict({"kind": "dense"}, config).layer_topk == ()
    for wrong in ([0.1, 0.0], [0.1, 1.5], [True, 0.1], ["0.1", 0.1], [0.1, float("nan")]):
        with pytest.raises(ValueError, match=r"attention\.layer_topk\[\d\]="):
            sla_by_layer(wrong)  # type: ignore[arg-type]
    for no_list in ("0.1", 0.1, None):
        with pytest.raises(ValueError, match=r"layer_topk=.*expected a list"):
            AttentionConfig("sla", layer_topk=no_list)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"leave it out with attention\.kind=dense"):
        AttentionConfig("dense", layer_topk=(0.1,))
