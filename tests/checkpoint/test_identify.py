"""What files and folders are, from their headers: every layout, every variant at its full size, and what they lack."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import CONFIG, make, network, output_path, save
from safetensors.torch import save_file

from turbotrain.checkpoint import CheckpointProblem
from turbotrain.checkpoint.convert import convert
from turbotrain.checkpoint.identify import identify, report, summary
from turbotrain.checkpoint.keymaps.targets import TARGETS
from turbotrain.checkpoint.layouts import PUBLISHED_SLA
from turbotrain.checkpoint.structure import compare, expected_shapes
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, WanConfig
from turbotrain.model.wan import WanTransformer

DENSE = AttentionConfig()


def full_size(path: Path, config: WanConfig, attention: AttentionConfig = DENSE) -> None:
    """A bf16 network of real dimensions, whose numbers are a hole in the file."""
    header, end = {}, 0
    for name, shape in expected_shapes(config, attention).items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("attention", [DENSE, PUBLISHED_SLA], ids=["dense", "sla"])
@pytest.mark.parametrize("config", [v.config for v in VARIANTS.values()], ids=list(VARIANTS))
def test_expected_shapes_are_the_networks(config: WanConfig, attention: AttentionConfig) -> None:
    with torch.device("meta"):
        model = WanTransformer(config, attention)
    shapes = expected_shapes(config, attention)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert compare(shapes, config, attention) == ([], [], [])


@pytest.mark.parametrize(
    ("variant", "experts", "said"),
    [
        ("wan2.1_t2v_1.3b", ("",), ["wan2.1_t2v_1.3b"]),
        ("wan2.1_t2v_14b", ("",), ["wan2.1_t2v_14b", "wan2.2_t2v_a14b"]),
        ("wan2.1_i2v_14b", ("",), ["wan2.1_i2v_14b"]),
        ("wan2.2_t2v_a14b", ("high_noise_model", "low_noise_model"), ["wan2.2_t2v_a14b"]),
        ("wan2.2_i2v_a14b", ("transformer", "transformer_2"), ["wan2.2_i2v_a14b"]),
        ("wan2.2_ti2v_5b", ("",), ["wan2.2_ti2v_5b"]),
    ],
)
def test_published_variants_at_full_size(
    tmp_path: Path, variant: str, experts: tuple[str], said: list[str], work_seconds: Callable[[], float]
) -> None:
    tmp_path = tmp_path / "checkpoint"  # the test's own name would tell the variant
    for expert in experts:
        full_size(tmp_path / expert / "diffusion_pytorch_model.safetensors", VARIANTS[variant].config)
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")
    started = work_seconds()
    identity = identify(tmp_path)
    found = summary(identity)
    assert work_seconds() - started < 2
    assert found["variants"] == said
    assert {network.meta.variant for network in identity.networks.values()} == {variant}
    assert found["beside"] == ["Wan2.1_VAE.pth"]
    assert list(found["experts"].values()) == ([str(tmp_path / e) for e in experts] if len(experts) == 2 else [])
    assert not found["missing"]
    assert not found["unexpected"]


HELD = [
    (layout, kind)
    for layout, target in TARGETS.items()
    for kind in ("dense", "sla", "int8_channel", "int8_block128")
    if kind == "dense" or (target.sla if kind == "sla" else kind in target.schemes)
]


@pytest.mark.parametrize(("layout", "kind"), HELD)
def test_layouts(tmp_path: Path, layout: str, kind: str) -> None:
    ours = make(kind, tmp_path / "ours")
    (ours / "model.safetensors").rename(tmp_path / "ours.safetensors")
    there = output_path(tmp_path, layout)
    convert(tmp_path / "ours.safetensors", there, layout)
    found = identify(there).first
    # Unquantized ComfyUI files are official ones; with our metadata they say whose they are.
    assert found.layout == ("turbotrain" if (layout, kind) == ("comfyui", "dense") else layout)
    assert found.attention.kind == ("sla" if kind == "sla" else "dense")
    assert found.scheme == (kind if kind.startswith("int8") else None)
    assert found.config == CONFIG
    assert found.problems == ""
    assert ("net." in found.stripped) == (layout == "rcm")


def test_wrappers_and_what_is_missing(tmp_path: Path) -> None:
    state = {f"module._orig_mod.{name}": tensor for name, tensor in network().state_dict().items()}
    state["module._orig_mod.blocks.0.extra.weight"] = torch.zeros(3)
    del state["module._orig_mod.blocks.1.norm3.bias"]
    state["module._orig_mod.head.head.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "a.safetensors")
    found = identify(tmp_path / "a.safetensors")
    assert found.first.stripped == ["_orig_mod.", "module."]
    assert found.first.missing == ["blocks.1.norm3.bias"]
    assert found.first.unexpected == ["blocks.0.extra.weight"]
    assert found.first.wrong == ["head.head.bias (5,) instead of (16,)"]
    for part in (
        "1 missing: blocks.1.norm3.bias",
        "1 unexpected: blocks.0.extra.weight",
        "stripped: _orig_mod., module.",
    ):
        assert part in report(found)


def test_comfyui_prefix_and_markers(tmp_path: Path) -> None:
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in network().state_dict().items()}
    save_file({**state, "scaled_fp8": torch.zeros(2)}, tmp_path / "a.safetensors")
    found = identify(tmp_path / "a.safetensors").first
    assert (found.layout, found.stripped, found.problems) == ("comfyui", ["model.diffusion_model."], "")
    linear = "model.diffusion_model.blocks.0.ffn.0"
    state |= {f"{linear}.input_scale": torch.ones(()), f"{linear}.weight_scale": torch.ones(())}
    state[f"{linear}.weight"] = state[f"{linear}.weight"].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "a.safetensors")
    found = identify(tmp_path / "a.safetensors").first
    assert (found.scheme, found.problems) == ("fp8_channel", "")
    assert [len(names) for names in found.unused.values()] == [1]


def test_two_files_are_a_pair_where_their_names_say_so(tmp_path: Path) -> None:
    for seed, name in enumerate(("Wan2.2-flow-high-rCM4.0.pth", "Wan2.2-flow-low-rCM1.0.pth")):
        torch.save(dict(network(seed=seed).state_dict()), tmp_path / name)
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")
    assert {e: n.path.name for e, n in identify(tmp_path).networks.items()} == {
        "high": "Wan2.2-flow-high-rCM4.0.pth",
        "low": "Wan2.2-flow-low-rCM1.0.pth",
    }


def test_metadata_decides_over_names(tmp_path: Path) -> None:
    """A network without the published head width tells its heads by our metadata."""
    config = dataclasses.replace(CONFIG, num_heads=4)
    attention = AttentionConfig("sla", 0.3, 64, 64)
    found = identify(save(tmp_path / "ours", network(config, attention))).first
    assert (found.described, found.config.num_heads, found.attention) == (True, 4, attention)
    assert "top-k 0.3, blocks 64 x 64" in report(identify(tmp_path / "ours"))


def test_safetensors_are_identified_without_torch(tmp_path: Path) -> None:
    full_size(tmp_path / "a.safetensors", VARIANTS["wan2.1_t2v_1.3b"].config)
    code = (
        "import sys\nfrom turbotrain.checkpoint.identify import identify, report\n"
        f"print(report(identify({str(tmp_path / 'a.safetensors')!r})))\nassert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert "wan2.1_t2v_1.3b (dim 1536" in done.stdout


def test_a_third_network_leaves_it_open_which_two_are_meant(tmp_path: Path) -> None:
    for name in ("a_high.safetensors", "a_low.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointProblem, match="several weights files"):
        identify(tmp_path)


def test_experts_may_differ_in_topk_by_layer_only(tmp_path: Path) -> None:
    def expert(name: str, **fields: Any) -> None:
        save(tmp_path / name, network(attention=AttentionConfig("sla", **fields)))

    expert("high", layer_topk=(0.05, 0.15))
    expert("low", layer_topk=(0.2, 0.05))
    found = identify(tmp_path)
    assert [part.attention.layer_topk for part in found.networks.values()] == [(0.05, 0.15), (0.2, 0.05)]
    assert "top-k 0.1 on average, 0.05 to 0.15 by layer" in report(found)
    shutil.rmtree(tmp_path / "low")
    expert("low", layer_topk=(0.2, 0.05), order="cube")
    with pytest.raises(CheckpointProblem, match="attention differs"):
        identify(tmp_path)
    shutil.rmtree(tmp_path / "low")
    expert("low", topk=0.1)
    with pytest.raises(CheckpointProblem, match="attention differs"):
        identify(tmp_path)
