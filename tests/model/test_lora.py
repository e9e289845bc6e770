"""Turbo-LoRA: nothing at first, then exactly what the merged network computes, gradients and tangents included."""

from __future__ import annotations

import pytest
import torch
from wan_networks import GRID, STRUCTURES, build, inputs, relative, tangents_of

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.lora import (
    LoraLinear,
    add_lora,
    load_change,
    lora_change,
    merged_state,
    over_same_weights,
)
from turbotrain.model.wan import WanTransformer

SLA = AttentionConfig("sla", topk=0.5, block_q=16, block_k=16)
ALL = ("self_attn.*", "cross_attn.*", "ffn.*")
RANK, ALPHA = 3, 6.0


def adapted(base: WanTransformer, attention: AttentionConfig | None = None, filled: bool = True) -> WanTransformer:
    """A network with LoRA over the weights of `base`; filled: with factors and P away from zero."""
    network = over_same_weights(base)
    if attention is not None:
        network.set_attention(attention).set_weight_dtype(base.dtype)
    add_lora(network, RANK, ALPHA, ALL, seed=5)
    if filled:
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for parameter in trained(network).values():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def trained(network: WanTransformer) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def merged(network: WanTransformer) -> WanTransformer:
    plain = WanTransformer(network.config, network.attention_config).set_weight_dtype(network.dtype)
    plain.load_state_dict(merged_state(network, {name: p.detach() for name, p in trained(network).items()}))
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_new_adapter_changes_nothing(structure: str, dtype: torch.dtype) -> None:
    base = build(structure, SLA).set_weight_dtype(dtype)
    network = adapted(base, filled=False)
    assert any(layer.lora_A.count_nonzero() for layer in network.modules() if isinstance(layer, LoraLinear))
    given = inputs(base.config, dtype)
    with torch.no_grad():
        for ours, theirs in zip(
            network(**given, tangents=tangents_of(given)), base(**given, tangents=tangents_of(given))
        ):
            assert torch.equal(ours, theirs)


def test_weights_are_shared_and_frozen_and_only_changes_are_trained() -> None:
    base = build(attention=AttentionConfig())
    student, critic = adapted(base, SLA), adapted(base)
    own = {name: p.data_ptr() for name, p in base.named_parameters()}
    for network in (student, critic):
        frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
        assert {name: p.data_ptr() for name, p in frozen.items()} == own
        factors = {name for name in trained(network) if name.endswith(("lora_A", "lora_B"))}
        assert len(factors) == 2 * 10 * base.config.num_layers, "q, k, v, o twice, and two of the feed-forward"
        assert all(p.dtype == torch.float32 for p in trained(network).values())
        rest = trained(network).keys() - factors
        assert all(".proj_l." in name for name in rest)
        assert len(rest) == (2 * base.config.num_layers if network is student else 0)
    assert not trained(student).keys() & own.keys()
    before = base.blocks[0].self_attn.q.weight.clone()  # type: ignore[union-attr]
    network = adapted(build(attention=SLA))
    (network(**inputs(network.config)).square().mean()).backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in trained(network).values())
    assert torch.equal(base.blocks[0].self_attn.q.weight, before)  # type: ignore[union-attr]


def test_networks_over_the_same_weights_have_an_sla_projection_each() -> None:
    base = build(attention=SLA)
    one, other = adapted(base, filled=False), adapted(base, filled=False)
    name = "blocks.0.self_attn.attn_op.local_attn.proj_l.weight"
    assert torch.equal(one.get_parameter(name), base.get_parameter(name))
    assert len({network.get_parameter(name).data_ptr() for network in (base, one, other)}) == 3


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("attention", [AttentionConfig(), SLA], ids=["dense", "sla"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_values_tangents_and_gradients_are_those_of_merged_weights(
    structure: str, attention: AttentionConfig, checkpointed: bool
) -> None:
    network = adapted(build(structure, attention, torch.float64))
    plain = merged(network)
    network.enable_activation_checkpointing(checkpointed)
    given = inputs(network.config, torch.float64, grid=GRID)
    target = torch.randn(given["x_BCTHW"].shape, dtype=torch.float64)
    found = []
    for model in (network, plain):
        given["x_BCTHW"] = given["x_BCTHW"].detach().requires_grad_()
        v, tv = model(**given, tangents=tangents_of(given))
        (v * target).sum().backward()
        found.append((v, tv, given["x_BCTHW"].grad))
    for ours, theirs in zip(*found):
        assert relative(ours, theirs) < 1e-12
    # dA = s B^T dW and dB = s dW A^T.
    scale = ALPHA / RANK
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLinear):
            change_NK = plain.get_parameter(f"{name}.weight").grad
            assert change_NK is not None
            assert layer.lora_A.grad is not None
            assert layer.lora_B.grad is not None
            assert relative(layer.lora_A.grad, scale * layer.lora_B.detach().T @ change_NK) < 1e-10, name
            assert relative(layer.lora_B.grad, scale * change_NK @ layer.lora_A.detach().T) < 1e-10, name
    for name, p in trained(network).items():
        if ".proj_l." in name:
            assert p.grad is not None
            assert relative(p.grad, plain.get_parameter(name).grad) < 1e-10  # type: ignore[arg-type]


def test_merged_weights_are_wide_whatever_the_frozen_ones_are() -> None:
    network = adapted(build(attention=SLA).set_weight_dtype(torch.bfloat16))
    state = merged_state(network, {name: p.detach() for name, p in trained(network).items()})
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    layer = network.get_submodule("blocks.1.ffn.2")
    assert isinstance(layer, LoraLinear)
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(state["blocks.1.ffn.2.weight"], exact.float())
    assert not any("lora" in name for name in state)


def test_a_change_comes_back_under_another_scale() -> None:
    base = build(attention=SLA)
    network = adapted(base)
    change = lora_change({name: p.detach() for name, p in trained(network).items()}, network)
    other = add_lora(over_same_weights(base), RANK, 4 * ALPHA, ALL, seed=1)
    load_change(other, change, "the change")
    given = inputs(base.config)
    with torch.no_grad():
        torch.testing.assert_close(other(**given), network(**given))


def test_bad_adapters_are_refused_by_name() -> None:
    def network() -> WanTransformer:
        return build(attention=SLA)

    with pytest.raises(ValueError, match=r"lora.rank=0: must be at least 1"):
        add_lora(network(), 0, 1.0, ALL, 0)
    with pytest.raises(ValueError, match=r"lora.rank=49: blocks.0.self_attn.q has only 48 dimensions"):
        add_lora(network(), 49, 1.0, ALL, 0)
    with pytest.raises(ValueError, match=r"'attn.q' fits no linear of a block; there are cross_attn.k, .*ffn.0"):
        add_lora(network(), 2, 1.0, ["self_attn.q", "attn.q"], 0)
    with pytest.raises(ValueError, match=r"lora.targets=\[\]"):
        add_lora(network(), 2, 1.0, [], 0)
    ready = add_lora(network(), 2, 1.0, ["self_attn.q"], 0)
    change = lora_change({name: p.detach() for name, p in trained(ready).items()}, ready)
    with pytest.raises(
        ValueError, match=r"file: blocks.0.self_attn.q.lora_A.weight has shape \(2, 48\), expected \(4,"
    ):
        load_change(add_lora(network(), 4, 1.0, ["self_attn.q"], 0), change, "file")
    with pytest.raises(ValueError, match=r"file: an adapter of other layers: missing \['blocks.0.self_attn.k"):
        load_change(add_lora(network(), 2, 1.0, ["self_attn.k"], 0), change, "file")
