"""Conversion: bit-exact round trips wherever two formats hold the same, what other libraries read, what is lost and said."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import convert as tool
import pytest
import torch
from conversions import CONFIG, assert_same_bits, make, network, output_path, quantized, save, stored
from safetensors.torch import load_file, save_file

from turbotrain.checkpoint import CheckpointProblem, load_transformer, read_meta
from turbotrain.checkpoint.convert import convert
from turbotrain.checkpoint.identify import identify
from turbotrain.checkpoint.keymaps.targets import TARGETS
from turbotrain.checkpoint.stream import Entry
from turbotrain.checkpoint.verify import compare_tensors
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import QuantLinear, dequantize_model

FIXTURES = Path(os.environ.get("TURBOTRAIN_FIXTURES", Path(__file__).parents[2].parent / "shared")) / "fixtures"
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"no fixtures at {FIXTURES}; set TURBOTRAIN_FIXTURES to their parent folder"
)
# Which layouts hold the same information of which networks.
HOLDERS = {
    "dense": tuple(TARGETS),
    "half": tuple(TARGETS),
    "clip": tuple(TARGETS),
    "sla": ("turbotrain", "diffusers", "turbodiffusion", "rcm"),
    "int8_block128": ("turbotrain", "turbodiffusion"),
    "int8_channel": ("turbotrain", "comfyui"),
    "fp8_channel": ("turbotrain", "comfyui"),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_round_trips_are_bit_exact_for_every_pair(kind: str, tmp_path: Path) -> None:
    ours = make(kind, tmp_path / "ours")
    first = {}
    for layout in HOLDERS[kind]:
        first[layout] = output_path(tmp_path / "first", layout)
        assert convert(ours, first[layout], layout).losses == []
    for here, there in itertools.permutations(HOLDERS[kind], 2):
        away = output_path(tmp_path / f"{here}-{there}", there)
        back = output_path(tmp_path / f"{here}-{there}-back", here)
        convert(first[here], away, there)
        convert(away, back, here)
        assert_same_bits(stored(back), stored(first[here]))
        assert_same_bits(stored(away), stored(first[there]))
        if TARGETS[here].metadata and TARGETS[there].metadata:
            assert read_meta(back) == read_meta(ours)


@pytest.mark.parametrize("layout", TARGETS)
def test_two_experts_keep_their_sides(layout: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("high", "low")):
        save(tmp_path / "ours" / name, network(seed=seed))
    there, back = output_path(tmp_path, layout, experts=2), tmp_path / "back"
    result = convert(tmp_path / "ours", there, layout, verified=True)
    assert [line.partition(" noise")[0] for line in result.verified] == ["high", "high", "low", "low"]
    assert list(identify(there).networks) == ["high", "low"]
    convert(there, back, "turbotrain")
    assert_same_bits(stored(back), stored(tmp_path / "ours"))
    high = load_transformer(identify(there).networks["high"].path).state_dict()
    assert all(torch.equal(high[name], tensor) for name, tensor in network(seed=0).state_dict().items())
    if layout == "diffusers":
        assert {p.name for p in there.iterdir()} == {"transformer", "transformer_2"}  # high noise, low noise
    if layout == "official":
        assert {p.name for p in there.iterdir()} == {"high_noise_model", "low_noise_model"}


def test_diffusers_loads_what_is_written_for_it(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = network()
    convert(save(tmp_path / "ours", model), tmp_path / "df", "diffusers", max_shard_bytes=400_000)
    assert len(list(tmp_path.glob("df/transformer/*-of-*.safetensors"))) > 2
    theirs, report = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "df", subfolder="transformer", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    x = torch.randn(1, CONFIG.in_channels, 2, 4, 4)
    context = torch.randn(1, 3, CONFIG.text_dim)
    with torch.no_grad():
        ours = model(x, torch.tensor([500.0]), context)
        out = theirs(x, torch.tensor([500.0]), context, return_dict=False)[0]
    assert (out - ours).norm() < 1e-5 * ours.norm()


def test_turbodiffusion_file_is_what_torch_loads_and_maps(tmp_path: Path) -> None:
    convert(make("int8_block128", tmp_path / "ours"), tmp_path / "a.pth", "turbodiffusion")
    for mmap in (False, True):
        state = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
        assert_same_bits(state, stored(tmp_path / "a.pth"))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in state.values())
    assert state["patch_embedding.weight"].shape == (128, 16)
    assert state["blocks.1.ffn.0.int8_weight"].dtype == torch.int8
    assert state["blocks.1.ffn.0.scale"].shape == (2, 1)
    convert(make("dense", tmp_path / "dense"), tmp_path / "b.pth", "rcm")
    assert all(name.startswith("net.") for name in torch.load(tmp_path / "b.pth", weights_only=True))


def test_comfyui_file_has_its_markers(tmp_path: Path) -> None:
    convert(make("int8_channel", tmp_path / "ours"), tmp_path / "a.safetensors", "comfyui")
    state = load_file(tmp_path / "a.safetensors")
    assert state["patch_embedding.weight"].ndim == 5
    assert state["blocks.0.ffn.0.weight"].dtype == torch.int8
    assert state["blocks.0.ffn.0.weight_scale"].shape == (192, 1)
    assert json.loads(bytes(state["blocks.0.ffn.0.comfy_quant"].tolist())) == {"format": "int8_tensorwise"}
    convert(make("fp8_channel", tmp_path / "eight"), tmp_path / "b.safetensors", "comfyui")
    state = load_file(tmp_path / "b.safetensors")
    assert state["blocks.0.ffn.0.weight_scale"].shape == ()
    assert json.loads(bytes(state["blocks.0.ffn.0.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}


@needs_fixtures
@pytest.mark.parametrize("name", ["t2v_dense", "t2v_quant"])
@pytest.mark.parametrize("layout", ["turbotrain", "diffusers", "turbodiffusion", "comfyui", "official"])
def test_fixtures_give_the_published_outputs_in_every_layout(name: str, layout: str, tmp_path: Path) -> None:
    there = output_path(tmp_path, layout)
    is_float = name == "t2v_dense" or layout in ("turbotrain", "turbodiffusion")
    dtype = None if is_float else "float32"
    convert(FIXTURES / f"{name}.pth", there, layout, dtype=dtype, lossy=not is_float)
    given = load_file(FIXTURES / f"{name}.io.safetensors")
    with torch.no_grad():
        out = load_transformer(there, dtype=torch.float32)(given["x"], given["timestep"], given["context"])
    assert (out - given["output"]).norm() < 2e-5 * given["output"].norm()
    if is_float:
        convert(there, tmp_path / "back.pth", "turbodiffusion")
        assert_same_bits(stored(tmp_path / "back.pth"), stored(FIXTURES / f"{name}.pth"))


LOSSES = {
    "tiles to rows": (
        lambda: quantized("int8_block128"),
        "comfyui",
        None,
        "20 int8_block128 layers are quantized anew",
    ),
    "rows to tiles": (lambda: quantized("int8_channel"), "turbodiffusion", None, "20 int8_channel layers"),
    "smoothing": (lambda: quantized("int8_channel", smooth=True), "comfyui", None, "4 SmoothQuant vectors"),
    "fp8 rows": (lambda: quantized("fp8_channel"), "comfyui", None, "20 fp8_channel layers are quantized anew"),
    "float layers": (
        lambda: quantized("int8_block128", partly=True),
        "turbodiffusion",
        None,
        "8 layers that were kept",
    ),
    "dequantized": (lambda: quantized("int8_block128"), "official", "float32", "20 8-bit layers are multiplied out"),
    "smooth floats": (lambda: quantized("int8_channel", smooth=True), "diffusers", "float32", "multiplied out"),
    "rounded": (lambda: network(), "turbotrain", "bfloat16", "float32 weights are rounded to bfloat16"),
    "P": (lambda: network(attention=AttentionConfig("sla")), "comfyui", None, "4 tensors of P are dropped"),
    "attention": (
        lambda: network(attention=AttentionConfig("sla", 0.2, 64, 64, "cube")),
        "turbodiffusion",
        None,
        "topk=0.2, block_q=64, order=cube would be read as published",
    ),
    "top-k by layer": (
        lambda: network(attention=AttentionConfig("sla", block_q=128, block_k=64, layer_topk=(0.05, 0.15))),
        "turbodiffusion",
        None,
        "layer_topk=[0.05, 0.15] would be read as published",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_are_refused_then_said_and_small(case: str, tmp_path: Path) -> None:
    build, layout, dtype, said = LOSSES[case]
    there = output_path(tmp_path, layout)
    ours = save(tmp_path / "ours", build())
    with pytest.raises(CheckpointProblem, match=r"cannot hold all of it.*--lossy goes on") as caught:
        convert(ours, there, layout, dtype=dtype)
    assert said in str(caught.value)
    assert not there.exists()
    result = convert(ours, there, layout, dtype=dtype, lossy=True, verified=True)
    assert any(said in loss for loss in result.losses)
    if case not in ("P", "attention"):
        error = float(result.verified[-1].rpartition(" ")[2])
        # A scale a row or tile: 8 bits leave about 1%; fp8 has 3 bits of mantissa.
        assert error < 0.05, result.verified
    if dtype == "float32":
        there = identify(there).path
        expected = dequantize_model(load_transformer(ours), torch.float32).state_dict()
        assert_same_bits(dict(load_transformer(there).state_dict()), dict(expected))


def test_layers_that_the_target_holds_are_carried_beside_those_it_does_not(tmp_path: Path) -> None:
    model = quantized("int8_channel")
    layer = model.get_submodule("blocks.0.ffn.0")
    assert isinstance(layer, QuantLinear)
    layer.register_buffer("smooth", torch.rand(CONFIG.dim) + 0.5)
    convert(save(tmp_path / "ours", model), tmp_path / "a.safetensors", "comfyui", lossy=True)
    before, after = stored(tmp_path / "ours"), stored(tmp_path / "a.safetensors")
    changed = [
        name.removesuffix(".int8_weight")
        for name, tensor in before.items()
        if name.endswith(".int8_weight") and not torch.equal(after[name.replace("int8_weight", "weight")], tensor)
    ]
    assert changed == ["blocks.0.ffn.0"]


def test_casts_that_keep_every_value_lose_nothing(tmp_path: Path) -> None:
    ours = make("half", tmp_path / "ours")
    assert convert(ours, tmp_path / "wide", "turbotrain", dtype="float32", verified=True).losses == []
    wide = stored(tmp_path / "wide")
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in stored(ours).items())
    assert read_meta(tmp_path / "wide").dtype == "float32"


def test_files_of_training(tmp_path: Path) -> None:
    """Raw weights and their average, wrappers inside names, nested under state_dict."""
    raw, average = network(seed=1).state_dict(), network(seed=2).state_dict()
    names = {name: name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module.") for name in raw}
    both = {f"net.{names[name]}": tensor for name, tensor in raw.items()}
    both.update({f"net_ema.{names[name]}": tensor for name, tensor in average.items()})
    torch.save({"state_dict": both, "iteration": 3}, tmp_path / "train.pth")
    found = identify(tmp_path / "train.pth").first
    assert found.layout == "rcm"
    assert found.stripped == ["_checkpoint_wrapped_module.", "net.", "net_ema."]
    result = convert(tmp_path / "train.pth", tmp_path / "ours", "turbotrain", verified=True)
    assert any(note.startswith(f"{len(raw)} training weights beside their average") for note in result.notes)
    assert_same_bits(stored(tmp_path / "ours"), dict(average))
    assert read_meta(tmp_path / "ours").lineage == [{"stage": "convert", "layout": "rcm", "files": ["train.pth"]}]


def test_components_come_along_or_are_left_alone(tmp_path: Path) -> None:
    ours = save(tmp_path / "ours", network(), components={"vae": "vae", "text_encoder": "someone/encoder"})
    result = convert(ours, tmp_path / "bare", "turbotrain")
    assert result.notes == ["the metadata name vae, not to be found beside the source: infer.py needs vae=FOLDER"]
    (ours / "vae").mkdir()
    (ours / "vae" / "config.json").write_text("{}")
    (ours / "notes.md").write_text("")
    assert convert(ours, tmp_path / "again", "turbotrain").notes == ["beside the weights lie notes.md: left alone"]
    assert (tmp_path / "again" / "vae" / "config.json").is_file()
    assert read_meta(tmp_path / "again").components == {"vae": "vae", "text_encoder": "someone/encoder"}
    assert convert(ours, tmp_path / "df", "diffusers").notes == ["beside the weights lie notes.md, vae/: left alone"]
    assert [path.name for path in (tmp_path / "df").iterdir()] == ["transformer"]


@pytest.mark.parametrize("said", [{"format": "int8_tensorwise", "convrot": True}, {"format": "nvfp4"}, "int8", None])
def test_weights_that_are_stored_in_another_way_are_not_taken_for_plain_ones(said: object, tmp_path: Path) -> None:
    convert(make("int8_channel", tmp_path / "ours"), tmp_path / "a.safetensors", "comfyui")
    state = stored(tmp_path / "a.safetensors")
    text = b"?" if said is None else json.dumps(said).encode()
    state["blocks.1.ffn.0.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointProblem, match=r"blocks\.1\.ffn\.0 is quantized as"):
        convert(tmp_path / "b.safetensors", tmp_path / "again", "turbotrain")
    with pytest.raises(CheckpointProblem, match=r"blocks\.1\.ffn\.0 is quantized as"):
        load_transformer(tmp_path / "b.safetensors")
    formats = json.dumps({"format_version": "1.0", "layers": {"blocks.1.ffn.0": said}})
    del state["blocks.1.ffn.0.comfy_quant"]
    save_file(state, tmp_path / "c.safetensors", metadata={"_quantization_metadata": formats})
    with pytest.raises(CheckpointProblem, match=r"blocks\.1\.ffn\.0 is quantized as"):
        load_transformer(tmp_path / "c.safetensors")


def test_components_of_experts_and_large_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("high", "low")):
        save(tmp_path / "ours" / name, network(seed=seed), components={"vae": "vae"})
    (tmp_path / "ours" / "vae").mkdir()
    (tmp_path / "ours" / "vae" / "config.json").write_text("{}")
    convert(tmp_path / "ours", tmp_path / "again", "turbotrain")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["high", "low", "vae"]
    monkeypatch.setattr("turbotrain.checkpoint.convert.COPIED_UP_TO", 1)
    convert(tmp_path / "ours", tmp_path / "named", "turbotrain")
    assert read_meta(tmp_path / "named" / "low").components == {"vae": str(tmp_path / "ours" / "vae")}


def test_components_do_not_lead_out_of_the_checkpoint(tmp_path: Path) -> None:
    ours = save(tmp_path / "a" / "ours", network(), components={"vae": "../secret"})
    (tmp_path / "a" / "secret").mkdir()
    (tmp_path / "b").mkdir()
    convert(ours, tmp_path / "b" / "out", "turbotrain")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["out"]


def test_verification_finds_what_differs(tmp_path: Path) -> None:
    ours = identify(make("dense", tmp_path / "ours")).first.native
    other = dict(ours)
    other["head.head.bias"] = Entry.of(ours["head.head.bias"].read() + 1e-7)
    with pytest.raises(CheckpointProblem, match=r"head\.head\.bias is not what was read"):
        compare_tensors(ours, other, tmp_path)
    del other["head.head.bias"]
    with pytest.raises(CheckpointProblem, match="one of the two checkpoints only"):
        compare_tensors(ours, other, tmp_path)


def test_large_networks_are_compared_by_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbotrain.checkpoint.verify._PART_OF_MEMORY", 0.0)
    result = convert(make("dense", tmp_path / "ours"), tmp_path / "df", "diffusers", verified=True)
    assert "equal bit for bit" in result.verified[0]
    assert "outputs not compared" in result.verified[1]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = make("int8_block128", tmp_path / "ours")
    assert tool.main([str(ours), "--to", "turbodiffusion", "-o", str(tmp_path / "a.pth"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "written: " in said
    assert "verified: outputs on random inputs equal bit for bit" in said
    assert "note: a TurboDiffusion file has no metadata; not carried: sampler, lineage, license" in said
    assert tool.main([str(tmp_path / "a.pth"), "--inspect"]) == 0
    assert "int8_block128, 20 of 20 block linears" in capsys.readouterr().out
    assert tool.main([str(tmp_path / "a.pth"), "--inspect", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "turbodiffusion"
    state = load_file(ours / "model.safetensors")
    save_file({name: t for name, t in state.items() if name != "head.head.bias"}, tmp_path / "less.safetensors")
    assert tool.main([str(tmp_path / "less.safetensors"), "--inspect"]) == 1
    assert "1 missing: head.head.bias" in capsys.readouterr().out
    before = (tmp_path / "a.pth").read_bytes()
    assert tool.main([str(ours), "--to", "turbodiffusion", "-o", str(tmp_path / "a.pth")]) == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert tool.main([str(ours), "--to", "turbodiffusion", "-o", str(tmp_path / "a.pth"), "--force"]) == 0
    assert (tmp_path / "a.pth").read_bytes() == before
