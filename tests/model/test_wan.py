"""The network as a module: precision islands, checkpointing, meta construction, smoothing vectors, bad inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_networks import STRUCTURES, build, inputs, randomise, relative

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.wan import WanTransformer

SLA = AttentionConfig("sla", 0.5, 16, 16)
GRID = (3, 6, 8)


def test_islands_stay_float32_and_the_rest_follows() -> None:
    model = build("i2v_clip", SLA, torch.bfloat16)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {name.split(".")[0] for name in wide} == {"time_embedding", "time_projection", "head", "blocks"}
    inside = {name.split(".", 2)[2] for name in wide if name.startswith("blocks.")}
    norms = {f"{attn}.norm_{x}.weight" for attn in ("self_attn", "cross_attn") for x in "qk"}
    proj = {f"self_attn.attn_op.local_attn.proj_l.{kind}" for kind in ("weight", "bias")}
    assert inside == norms | proj | {"modulation", "norm3.weight", "norm3.bias", "cross_attn.norm_k_img.weight"}
    assert {p.dtype for p in model.set_weight_dtype(torch.float64).parameters()} == {torch.float64}


@torch.no_grad()
def test_timestep_keeps_its_precision_in_bfloat16() -> None:
    """933.8 and 932 are one bf16 number; a network that casts its timestep cannot tell them apart."""
    model = build(dtype=torch.bfloat16)
    given = inputs(model.config, torch.bfloat16)
    a, b = (model(**{**given, "timestep": torch.tensor([t, t])}) for t in (933.8, 932.0))
    assert a.dtype == torch.float32
    assert relative(a, b) > 1e-3


@torch.no_grad()
def test_one_time_per_token_generalises_one_per_sample() -> None:
    model = build(dtype=torch.float64)
    given = inputs(model.config, torch.float64)
    per_sample = model(**given)
    tokens = given["timestep"][:, None].expand(-1, 18)
    assert relative(model(**{**given, "timestep": tokens}), per_sample) < 1e-13
    assert torch.equal(model(**{**given, "timestep": given["timestep"][:, None]}), per_sample)


@torch.no_grad()
def test_samples_of_a_batch_are_independent() -> None:
    model = build("i2v_clip", SLA, torch.float64)
    given = inputs(model.config, torch.float64, grid=GRID)
    together = model(**given)
    alone = model(**{name: value[1:] for name, value in given.items()})
    assert relative(together[1:], alone) < 1e-12


@pytest.mark.parametrize("attention", [AttentionConfig(), SLA], ids=["dense", "sla"])
def test_activation_checkpointing_gives_equal_gradients(attention: AttentionConfig) -> None:
    model = build("i2v_clip", attention)
    given = inputs(model.config, grid=GRID)

    def gradients() -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        v = model(**given)
        v.square().sum().backward()
        return v.detach(), [p.grad for p in model.parameters()]

    v, plain = gradients()
    model.enable_activation_checkpointing()
    again, recomputed = gradients()
    assert torch.equal(v, again)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(plain, recomputed))


def test_activation_checkpointing_stores_less() -> None:
    model = build(attention=SLA)
    given = inputs(model.config, grid=GRID)

    def saved_bytes() -> int:
        sizes: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**given)
        return sum(sizes)

    plain = saved_bytes()
    model.enable_activation_checkpointing()
    assert saved_bytes() < 0.3 * plain


def test_meta_construction_then_loading_equals_the_original() -> None:
    original = build("i2v_clip", SLA)
    with torch.device("meta"):
        empty = WanTransformer(original.config, SLA)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(original.state_dict(), strict=True)
    given = inputs(original.config, grid=GRID)
    with torch.no_grad():
        assert torch.equal(empty(**given), original(**given))


def test_state_dict_names_are_the_official_ones() -> None:
    from turbotrain.checkpoint.layouts import to_layout

    for structure in STRUCTURES:
        state = build(structure, SLA).state_dict()
        assert list(to_layout(state, "official")) == list(state)


def test_initial_network_outputs_zero_and_depends_on_the_seed() -> None:
    torch.manual_seed(0)
    first = WanTransformer(STRUCTURES["t2v"])
    second = WanTransformer(STRUCTURES["t2v"])
    assert not torch.equal(first.blocks[0].get_parameter("modulation"), second.blocks[0].get_parameter("modulation"))
    with torch.no_grad():
        assert not first(**inputs(first.config)).any()


@torch.no_grad()
def test_smoothing_vectors_cancel_against_the_weights() -> None:
    model = build(dtype=torch.float64)
    given = inputs(model.config, torch.float64)
    expected = model(**given)
    smoothed = copy.deepcopy(model)
    for block in smoothed.blocks:
        for name, layers in (
            ("smooth_attn", ("self_attn.q", "self_attn.k", "self_attn.v")),
            ("smooth_ffn", ("ffn.0",)),
        ):
            vector = torch.rand(model.config.dim, dtype=torch.float64) + 0.5
            setattr(block, name, vector)
            for layer in layers:
                block.get_submodule(layer).get_parameter("weight").mul_(vector)
    assert relative(smoothed(**given), expected) < 1e-13
    assert {"blocks.0.smooth_attn", "blocks.1.smooth_ffn"} <= set(smoothed.state_dict())
    assert not any("smooth" in name for name in model.state_dict())


def test_training_reduces_the_loss() -> None:
    model = randomise(WanTransformer(STRUCTURES["t2v"], SLA))
    given = inputs(model.config, grid=GRID)
    target = torch.randn_like(given["x_BCTHW"])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = (model(**given) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "channels": ("t2v", {"x_BCTHW": torch.zeros(2, 3, 3, 4, 6)}, r"\(2, 3, 3, 4, 6\).*\(B, 4, T, H, W\)"),
    "odd size": ("t2v", {"x_BCTHW": torch.zeros(2, 4, 3, 5, 6)}, r"\(3, 5, 6\).*multiple"),
    "no y": ("i2v_concat", {"y_BCTHW": None}, "y is none: this network takes 5 channels"),
    "y of t2v": ("t2v", {"y_BCTHW": torch.zeros(2, 4, 3, 4, 6)}, "takes 0 channels"),
    "y size": ("i2v_concat", {"y_BCTHW": torch.zeros(2, 5, 2, 4, 6)}, r"takes 5 channels of \(T, H, W\)"),
    "no clip": ("i2v_clip", {"clip_BLD": None}, "clip is missing"),
    "clip of t2v": ("t2v", {"clip_BLD": torch.zeros(2, 5, 24)}, "this network takes none"),
    "context": ("t2v", {"context_BLD": torch.zeros(2, 9, 21)}, r"\(2, 9, 21\).*\(2, tokens, 20\)"),
    "times": ("t2v", {"timestep": torch.zeros(2, 17)}, r"\(2, 17\).*\(2, 18\)"),
    "selection": ("t2v", {"selection": [None]}, "lists 1 layers: this network has 2"),
    "tangents": ("t2v", {"tangents": (torch.zeros(2, 4, 3, 4, 6), torch.zeros(1))}, "tangents have shapes"),
}


@pytest.mark.parametrize("case", BAD)
def test_inputs_that_do_not_fit_say_what_was_expected(case: str) -> None:
    structure, change, message = BAD[case]
    model = build(structure)
    with pytest.raises(ValueError, match=message):
        model(**{**inputs(model.config), **change})
