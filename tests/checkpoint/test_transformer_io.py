"""Networks written and read back: our own format, every foreign layout, 8-bit layers, overrides."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import CONFIG, network
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbotrain.checkpoint import (
    CheckpointMeta,
    CheckpointProblem,
    load_transformer,
    read_checkpoint,
    read_meta,
    save_checkpoint,
)
from turbotrain.checkpoint.layouts import PUBLISHED_SLA, native_names, strip_wrappers, to_layout
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import QuantLinear, dequantize_model
from turbotrain.model.variants import VARIANTS
from turbotrain.model.wan import WanTransformer

SLA = AttentionConfig("sla", 0.25, 16, 32, "cube", "elu")


def describe(model: WanTransformer, **fields: Any) -> CheckpointMeta:
    return CheckpointMeta(config=model.config.to_dict(), attention=model.attention_config.to_dict(), **fields)


@torch.no_grad()
def run(model: WanTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, model.config.out_channels, 2, 4, 4, generator=generator)
    context = torch.randn(1, 3, model.config.text_dim, generator=generator)
    return model(x, torch.tensor([600.0]), context)


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_round_trip_keeps_weights_and_description(tmp_path: Path) -> None:
    model = network(attention=SLA)
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "config.json").write_text("{}")
    meta = describe(
        model,
        sampler={"sigma_max": 80.0, "times": [1.5, 1.4, 1.0], "ode": False},
        lineage=[{"stage": "teacher"}, {"stage": "sla", "steps": 3}],
        license="Apache-2.0",
    )
    save_checkpoint(tmp_path / "out", model.state_dict(), meta, components_from={"vae": tmp_path / "codec"})
    again = load_transformer(tmp_path / "out")
    assert_equal(again.state_dict(), model.state_dict())
    assert (again.config, again.attention_config) == (model.config, SLA)
    state, found = read_checkpoint(tmp_path / "out")
    assert_equal(state, dict(model.state_dict()))
    assert found == read_meta(tmp_path / "out") == dataclasses.replace(meta, components={"vae": "vae"})
    assert (tmp_path / "out" / "vae" / "config.json").is_file()
    assert torch.equal(run(again), run(model))


def test_sharded_round_trip(tmp_path: Path) -> None:
    model = network()
    save_checkpoint(tmp_path / "out", model.state_dict(), describe(model), max_shard_bytes=400_000)
    shards = sorted(tmp_path.glob("out/model-*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 420_000 for shard in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert_equal(load_transformer(tmp_path / "out").state_dict(), model.state_dict())
    assert_equal(load_transformer(tmp_path / "out" / "model.safetensors.index.json").state_dict(), model.state_dict())
    shards[1].unlink()
    with pytest.raises(ValueError, match=shards[1].name):
        load_transformer(tmp_path / "out")


@pytest.mark.parametrize(
    "prefix",
    ["", "net.", "module.", "diffusion_model.", "model.diffusion_model.", "module.net.", "_orig_mod.", "net_ema."],
)
def test_prefixes_of_wrappers_and_trainers(tmp_path: Path, prefix: str) -> None:
    model = network()
    torch.save({prefix + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "net.pth")
    assert_equal(load_transformer(tmp_path / "net.pth").state_dict(), model.state_dict())


def test_wrappers_inside_names() -> None:
    name = "module.blocks.3._checkpoint_wrapped_module.self_attn._orig_mod.q.weight"
    assert strip_wrappers(name) == "blocks.3.self_attn.q.weight"
    with pytest.raises(ValueError, match="both mean"):
        native_names(["net.head.modulation", "head.modulation"])


def test_average_weights_win_over_raw_ones(tmp_path: Path) -> None:
    raw, average = network(seed=1).state_dict(), network(seed=2).state_dict()
    both = {f"net.{name}": tensor for name, tensor in raw.items()}
    both.update({f"net_ema.{name}": tensor for name, tensor in average.items()})
    torch.save({"state_dict": both}, tmp_path / "train.pth")
    assert_equal(load_transformer(tmp_path / "train.pth").state_dict(), dict(average))


@pytest.mark.parametrize("layout", ["official", "diffusers", "turbodiffusion"])
@pytest.mark.parametrize("attention", [None, PUBLISHED_SLA], ids=["dense", "sla"])
def test_foreign_layouts(tmp_path: Path, layout: str, attention: AttentionConfig | None) -> None:
    model = network(dataclasses.replace(CONFIG, image_dim=24, in_channels=9, model_type="i2v"), attention)
    theirs = to_layout(model.state_dict(), layout)
    assert (theirs["patch_embedding.weight"].ndim == 2) == (layout == "turbodiffusion")
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "weights.safetensors")
    again = load_transformer(tmp_path)
    assert_equal(again.state_dict(), model.state_dict())
    assert again.config == model.config
    assert again.attention_config == (attention or AttentionConfig())


def test_layouts_name_what_they_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.gate"):
        to_layout({"blocks.0.gate.weight": torch.zeros(1)}, "diffusers")
    with pytest.raises(ValueError, match="choose one of"):
        to_layout({}, "comfy")
    # Its patch embedding is a matrix, which readers take for patches of (1, 2, 2).
    with pytest.raises(ValueError, match=r"patches of \(1, 2, 2\) only, this network's are \(1, 1, 1\)"):
        to_layout({"patch_embedding.weight": torch.zeros(8, 4, 1, 1, 1)}, "turbodiffusion")


def test_heads_come_from_config_json(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, dim=96, num_heads=6, eps=1e-5)
    save_file(dict(network(config).state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="num_attention_heads"):
        load_transformer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 6, "eps": 1e-5, "in_dim": 4}))
    assert load_transformer(tmp_path).config == config


def test_variant_is_recognised_by_dimensions_and_place(tmp_path: Path) -> None:
    model = WanTransformer(VARIANTS["shapes"].config)
    save_file(dict(model.state_dict()), tmp_path / "teacher.safetensors")
    meta = read_meta(tmp_path / "teacher.safetensors")
    assert (meta.variant, meta.config["num_heads"]) == ("shapes", 4)
    assert load_transformer(tmp_path).config == VARIANTS["shapes"].config


def test_dtypes(tmp_path: Path) -> None:
    model = network(attention=SLA).set_weight_dtype(torch.bfloat16)
    save_checkpoint(tmp_path / "out", model.state_dict(), describe(model, dtype="bfloat16"))
    as_stored = load_transformer(tmp_path / "out")
    assert {name: p.dtype for name, p in as_stored.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    assert {p.dtype for p in load_transformer(tmp_path / "out", dtype=torch.float32).parameters()} == {torch.float32}
    assert {p.dtype for p in load_transformer(tmp_path / "out", dtype=torch.float64).parameters()} == {torch.float64}
    with pytest.raises(ValueError, match="floating dtype"):
        load_transformer(tmp_path / "out", dtype=torch.int8)


def test_bfloat16_files_get_float32_islands(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in network().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    model = load_transformer(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.head.head.weight.dtype == model.blocks[0].get_parameter("modulation").dtype == torch.float32


def test_attention_overrides(tmp_path: Path) -> None:
    model = network(attention=SLA)
    save_checkpoint(tmp_path / "out", model.state_dict(), describe(model))
    changed = load_transformer(tmp_path / "out", attention={"topk": 1.0})
    assert changed.attention_config == dataclasses.replace(SLA, topk=1.0)
    assert_equal(changed.state_dict(), model.state_dict())
    dense = load_transformer(tmp_path / "out", attention={"kind": "dense"})
    assert not any("proj_l" in name for name in dense.state_dict())
    save_checkpoint(tmp_path / "dense", dense.state_dict(), describe(dense))
    sparse = load_transformer(tmp_path / "dense", attention={"kind": "sla", "topk": 0.15, "block_q": 64, "block_k": 64})
    assert not sparse.state_dict()["blocks.1.self_attn.attn_op.local_attn.proj_l.weight"].any()
    with pytest.raises(ValueError, match=r"attention\.topk=0"):
        load_transformer(tmp_path / "dense", attention={"topk": 0})


def test_topk_by_layer_travels_with_the_file(tmp_path: Path) -> None:
    layered = dataclasses.replace(SLA, layer_topk=(0.5, 1.0))
    model = network(attention=layered)
    save_checkpoint(tmp_path / "out", model.state_dict(), describe(model))
    again = load_transformer(tmp_path / "out")
    assert again.attention_config == layered
    assert torch.equal(run(again), run(model))
    operators: list[Any] = [block.get_submodule("self_attn.attn_op") for block in again.blocks]
    assert [operator.config.topk for operator in operators] == [0.5, 1.0]
    in_8_bits = load_transformer(tmp_path / "out", attention={"kind": "sage_sla"})
    assert in_8_bits.attention_config == dataclasses.replace(layered, kind="sage_sla")
    assert load_transformer(tmp_path / "out", attention={"topk": 0.2}).attention_config.layer_topk == ()
    assert load_transformer(tmp_path / "out", attention={"kind": "dense"}).attention_config.layer_topk == ()
    assert "layer_topk" not in SLA.to_dict(), "other files stay as they were"
    meta = describe(model)
    meta.attention["layer_topk"] = [0.5, 0.5, 0.5]
    save_checkpoint(tmp_path / "other", model.state_dict(), meta)
    with pytest.raises(CheckpointProblem, match=r"other.*3 values for 2 layers"):
        load_transformer(tmp_path / "other")


@pytest.mark.parametrize("scheme", ["int8_channel", "int8_block128", "fp8_channel"])
def test_quantized_round_trip(tmp_path: Path, scheme: str) -> None:
    model = network()
    for block in model.blocks:
        for name in ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2"):
            smooth = torch.rand(block.get_submodule(name).in_features) + 0.5 if name == "ffn.2" else None  # type: ignore[operator]
            block.set_submodule(name, QuantLinear.from_linear(block.get_submodule(name), scheme, smooth))  # type: ignore[arg-type]
        block.smooth_ffn = torch.rand(model.config.dim) + 0.5
    save_checkpoint(tmp_path / "out", model.state_dict(), describe(model, quantization={"scheme": scheme}))
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    kind = "fp8_weight" if scheme == "fp8_channel" else "int8_weight"
    assert {f"blocks.1.ffn.2.{kind}", "blocks.1.ffn.2.scale", "blocks.1.ffn.2.smooth", "blocks.0.smooth_ffn"} <= names
    again = load_transformer(tmp_path / "out")
    assert_equal(again.state_dict(), model.state_dict())
    assert torch.equal(run(again), run(model))
    floating = load_transformer(tmp_path / "out", dtype=torch.float32)
    assert_equal(floating.state_dict(), dequantize_model(model, torch.float32).state_dict())
    assert not any("smooth" in name or "weight_q" in name for name in floating.state_dict())


@pytest.mark.parametrize("project", ["lightx2v", "comfyui"])
def test_eight_bit_files_of_other_projects(tmp_path: Path, project: str) -> None:
    """LightX2V: int8 blocks with (N, 1) scales. ComfyUI: every linear fp8 with a scalar, prefix, marker tensors."""
    state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    theirs: dict[str, Tensor] = {} if project == "lightx2v" else {"diffusion_model.scaled_fp8": torch.zeros(2)}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        inside = name.startswith("blocks.")
        is_linear = kind == "weight" and tensor.ndim == 2
        if project == "lightx2v":
            theirs[name] = tensor
            if is_linear and inside:
                scale = tensor.abs().amax(1, keepdim=True) / 127
                theirs |= {name: (tensor / scale).round().to(torch.int8), f"{layer}.weight_scale": scale}
                state[name] = theirs[name] * scale
        else:
            theirs[f"diffusion_model.{name}"] = tensor
            if is_linear:
                scale = tensor.abs().max() / 448
                fp8 = (tensor / scale).to(torch.float8_e4m3fn)
                theirs |= {f"diffusion_model.{name}": fp8, f"diffusion_model.{layer}.scale_weight": scale}
                state[name] = fp8.float() * scale
    save_file(theirs, tmp_path / "model.safetensors")
    floating = load_transformer(tmp_path, dtype=torch.float32).state_dict()
    assert floating.keys() == state.keys()
    assert all(torch.allclose(floating[name], state[name], atol=1e-7) for name in state)
    kept = load_transformer(tmp_path)
    scheme = "int8_channel" if project == "lightx2v" else "fp8_channel"
    quantized = {module.scheme for module in kept.modules() if isinstance(module, QuantLinear)}
    assert quantized == {scheme}
    assert read_meta(tmp_path).quantization == {"scheme": scheme}
    theirs = {
        name: t.to(torch.uint8) if t.dtype in (torch.int8, torch.float8_e4m3fn) else t for name, t in theirs.items()
    }
    save_file(theirs, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="only int8 and float8_e4m3fn"):
        load_transformer(tmp_path)


def test_incomplete_quantized_file(tmp_path: Path) -> None:
    model = network()
    layer = model.get_submodule("blocks.0.ffn.0")
    model.set_submodule("blocks.0.ffn.0", QuantLinear.from_linear(layer, "int8_channel"))  # type: ignore[arg-type]
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".scale")}
    save_checkpoint(tmp_path / "out", state, describe(model))
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.0.*scale"):
        load_transformer(tmp_path / "out")


def test_strictness_lists_what_is_wrong(tmp_path: Path) -> None:
    model = network()
    state = dict(model.state_dict())
    state["blocks.0.extra.weight"] = torch.zeros(2)
    del state["blocks.1.norm3.bias"]
    state["head.head.bias"] = torch.zeros(5)
    save_checkpoint(tmp_path / "out", state, describe(model))
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_transformer(tmp_path / "out")
    for part in (
        "1 missing: blocks.1.norm3.bias",
        "1 unexpected: blocks.0.extra.weight",
        "head.head.bias (5,)",
        "dim 128",
    ):
        assert part in str(caught.value)


def test_other_networks_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"decoder.conv1.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"not a Wan transformer.*decoder\.conv1\.weight"):
        load_transformer(tmp_path / "vae.safetensors")
    state = dict(network().state_dict())
    save_file({**state, "vace_blocks.0.before_proj.weight": torch.zeros(3)}, tmp_path / "vace.safetensors")
    with pytest.raises(ValueError, match="unexpected: vace_blocks"):
        load_transformer(tmp_path / "vace.safetensors")


def test_loaded_weights_do_not_depend_on_the_file(tmp_path: Path) -> None:
    """Tensors are aligned copies, so that vectorised sums round as they do for the network that was saved."""
    model = network()
    save_checkpoint(tmp_path / "out", model.state_dict(), describe(model))
    again = load_transformer(tmp_path / "out")
    assert all(p.data_ptr() % 64 == 0 for p in again.parameters())
    assert all(p.requires_grad for p in again.parameters())
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    assert torch.equal(run(again), run(model))
