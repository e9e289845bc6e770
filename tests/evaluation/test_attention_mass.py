"""Softmax mass on kept blocks, and top-k shared out over layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import turbokernels as tk

from turbotrain.evaluation.attention_mass import _held, attention_mass, share_out
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import WanConfig
from turbotrain.model.wan import WanTransformer

SMALL = WanConfig(
    24, 32, 2, 3, in_channels=4, out_channels=4, text_dim=8, text_len=4, freq_dim=16, patch_size=(1, 1, 1)
)

BLOCKS = AttentionConfig(block_q=16, block_k=16)


def _network(attention: AttentionConfig | None = None) -> WanTransformer:
    torch.manual_seed(0)
    network = WanTransformer(SMALL, attention)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network


def _call(network: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 3, 4, 8, generator=generator), torch.randn(1, 4, 8, generator=generator)
    return network(x, torch.tensor([500.0]), text)


def test_mass_is_that_of_the_kept_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 90, 3, 8), torch.randn(2, 90, 3, 8)  # the last blocks are ragged
    held_NT = _held(q, k, [0.3, 1.0], 16, 32)
    kept = tk.select_blocks(q, k, 0.3, 16, 32).kept
    weights_BNLL = torch.einsum("blnd,bmnd->bnlm", q, k).div(8**0.5).softmax(-1)
    for head in range(3):
        total = 0.0
        for sample in range(2):
            for row in range(90):
                blocks = kept[sample, head, row // 16].tolist()
                total += sum(float(weights_BNLL[sample, head, row, 32 * b : 32 * b + 32].sum()) for b in blocks)
        assert float(held_NT[head, 0]) == pytest.approx(total / 180, rel=1e-5)
    assert held_NT[:, 1].tolist() == pytest.approx([1.0] * 3)
    monkeypatch.setattr("turbotrain.evaluation.attention_mass.SCORES_AT_ONCE", 2 * 3 * 90 * 20)  # parts of 20 queries
    torch.testing.assert_close(_held(q, k, [0.3, 1.0], 16, 32), held_NT)


def test_every_layer_and_head_is_measured_and_the_kind_does_not_matter() -> None:
    topks = (0.2, 0.5, 1.0)
    masses = attention_mass(_network(), [_call], topks, BLOCKS)
    assert (len(masses), len(masses[0]), len(masses[0][0])) == (3, 2, 3)
    for layer in masses:
        for head in layer:
            assert 0 < head[0] < head[1] < head[2] == pytest.approx(1)
    everything = AttentionConfig("sla", topk=1.0, block_q=16, block_k=16)
    dense = _network()
    sparse = WanTransformer(SMALL)
    sparse.load_state_dict(dense.state_dict())
    again = attention_mass(sparse.set_attention(everything), [_call], topks, BLOCKS)
    torch.testing.assert_close(torch.tensor(again), torch.tensor(masses), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="never asked"):
        attention_mass(dense, [], topks, BLOCKS)


def test_tokens_are_watched_in_the_order_that_is_asked_for_and_the_network_stays_as_it_was() -> None:
    network, cube = _network(), AttentionConfig("sla", topk=1.0, block_q=16, block_k=16, order="cube")
    own = network.attention_config
    found = attention_mass(network, [_call], (0.2, 1.0), cube)
    assert network.attention_config == own
    in_order = _network().set_attention(dataclasses.replace(own, order="cube", block_q=16, block_k=16))
    assert found == attention_mass(in_order, [_call], (0.2, 1.0), in_order.attention_config)
    assert found != attention_mass(network, [_call], (0.2, 1.0), BLOCKS)
    with pytest.raises(RuntimeError, match="lost"):
        attention_mass(network, [_lost], (0.2, 1.0), cube)
    assert network.attention_config == own


def _lost(network: torch.nn.Module) -> None:
    raise RuntimeError("lost")


def test_a_budget_goes_where_it_keeps_most() -> None:
    topks = (0.1, 0.2, 0.4, 1.0)
    steep, flat = [[0.2, 0.6, 0.8, 1.0]], [[0.95, 0.96, 0.98, 1.0]]
    assert share_out([steep, flat], topks, 0.1) == [0.1, 0.1]
    assert share_out([steep, flat], topks, 0.15) == [0.2, 0.1]
    assert share_out([steep, flat], topks, 0.25) == [0.4, 0.1]
    assert share_out([flat, steep, flat], topks, 0.2) == [0.1, 0.4, 0.1]
    assert share_out([steep, flat], topks, 1.0) == [1.0, 1.0]
    # A curve that first rises slowly is taken over its hull: the dear step is worth it together with the next.
    late = [[0.1, 0.11, 0.9, 1.0]]
    assert share_out([late, flat], topks, 0.25) == [0.4, 0.1]
    assert share_out([late, flat], topks, 0.15) == [0.1, 0.2]
    # What a layer holds already is not bought again, though the budget would do.
    full = [[0.5, 1.0, 1.0, 1.0]]
    assert share_out([full, flat], topks, 1.0) == [0.2, 1.0]
    assert share_out([[[1.0] * 4], [[1.0] * 4]], topks, 0.6) == [0.1, 0.1]
    with pytest.raises(ValueError, match="below the smallest"):
        share_out([steep], topks, 0.05)
    with pytest.raises(ValueError, match="must rise"):
        share_out([steep], (0.2, 0.1), 0.3)
