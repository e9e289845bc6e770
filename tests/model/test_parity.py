"""Agreement with independent implementations: diffusers' network, and the outputs in the fixtures folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from wan_networks import GRID, STRUCTURES, build, inputs, relative

from turbotrain import load_transformer
from turbotrain.checkpoint.layouts import from_layout, to_layout
from turbotrain.model.variants import WanConfig
from turbotrain.model.wan import WanTransformer

diffusers = pytest.importorskip("diffusers")
FIXTURES = Path(os.environ.get("TURBOTRAIN_FIXTURES", Path(__file__).parents[2].parent / "shared")) / "fixtures"


def diffusers_network(config: WanConfig) -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim if config.image_dim else None,
    )


def call_diffusers(network: Any, given: dict[str, Any]) -> Tensor:
    x, y = given["x_BCTHW"], given.get("y_BCTHW")
    x = x if y is None else torch.cat([x, y], dim=1)
    return network(x, given["timestep"], given["context_BLD"], given.get("clip_BLD"), return_dict=False)[0]


def structure_inputs(structure: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    config = STRUCTURES[structure]
    given = inputs(config, dtype)
    if config.image_dim is not None:  # diffusers takes the last 512 context tokens for the text
        given["context_BLD"] = torch.randn(2, 512, config.text_dim, generator=torch.Generator().manual_seed(3)).to(
            dtype
        )
    return given


@pytest.mark.parametrize("structure", STRUCTURES)
@torch.no_grad()
def test_float32_parity_with_diffusers_through_the_key_map(structure: str) -> None:
    ours = build(structure)
    theirs = diffusers_network(ours.config)
    theirs.load_state_dict(to_layout(ours.state_dict(), "diffusers"), strict=True)
    given = structure_inputs(structure)
    assert relative(ours(**given), call_diffusers(theirs, given)) < 1e-5


@pytest.mark.parametrize("structure", STRUCTURES)
@torch.no_grad()
def test_diffusers_weights_load_into_ours(structure: str) -> None:
    config = STRUCTURES[structure]
    torch.manual_seed(0)
    theirs = diffusers_network(config)
    for parameter in theirs.parameters():
        parameter.normal_(std=0.2)
    ours = WanTransformer(config)
    state = from_layout(theirs.state_dict())
    ours.load_state_dict(state, strict=True)
    given = structure_inputs(structure)
    assert relative(ours(**given), call_diffusers(theirs, given)) < 1e-5
    back = to_layout(state, "diffusers")
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


@torch.no_grad()
def test_bfloat16_is_as_accurate_as_diffusers() -> None:
    """Error to float64 at most twice that of diffusers in the same precision."""
    exact = build(dtype=torch.float64)
    ours = build(dtype=torch.bfloat16)
    rounded = {name: tensor.double() for name, tensor in ours.state_dict().items()}
    exact.load_state_dict(rounded)
    theirs = diffusers_network(ours.config)
    theirs.load_state_dict(to_layout(ours.state_dict(), "diffusers"), strict=True)
    for name, parameter in theirs.named_parameters():
        if not any(part in name for part in ("time_embedder", "scale_shift_table", "norm")):
            parameter.data = parameter.data.bfloat16()
    given = inputs(ours.config, torch.bfloat16)
    reference = exact(**{name: value.double() for name, value in given.items()})
    ours_error = relative(ours(**given), reference)
    theirs_error = relative(call_diffusers(theirs, given), reference)
    assert ours_error < 2 * theirs_error + torch.finfo(torch.bfloat16).eps


@pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"no fixtures at {FIXTURES}; set TURBOTRAIN_FIXTURES to their parent folder"
)
@pytest.mark.parametrize("name", ["t2v_dense", "t2v_quant"])
@torch.no_grad()
def test_published_layout_fixture(name: str) -> None:
    model = load_transformer(FIXTURES / f"{name}.pth", dtype=torch.float32)
    given = load_file(FIXTURES / f"{name}.io.safetensors")
    assert relative(model(given["x"], given["timestep"], given["context"]), given["output"]) < 2e-5


@pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"no fixtures at {FIXTURES}; set TURBOTRAIN_FIXTURES to their parent folder"
)
@torch.no_grad()
def test_quantized_fixture_stays_8_bit_without_a_dtype() -> None:
    model = load_transformer(FIXTURES / "t2v_quant.pth")
    kept = [tensor for name, tensor in model.state_dict().items() if name.endswith(".weight_q")]
    assert len(kept) == 20
    assert all(tensor.dtype == torch.int8 for tensor in kept)
    given = load_file(FIXTURES / "t2v_quant.io.safetensors")
    error = relative(model(given["x"], given["timestep"], given["context"]), given["output"])
    assert 1e-4 < error < 0.05  # activations are 8-bit too: close, and visibly not the float result


def test_grid_is_not_degenerate() -> None:
    assert len(set(GRID)) == 3  # swapped axes would show
