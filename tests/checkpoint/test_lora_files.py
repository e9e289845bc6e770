"""Files of adapters under every name that is read, and tools/merge.py --lora: the sum, its layout, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import merge as tool
import pytest
import torch
from conversions import CONFIG, make, network, output_path, save, stored
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbotrain.checkpoint import CheckpointMeta, CheckpointProblem, load_transformer, read_meta
from turbotrain.checkpoint.convert import convert
from turbotrain.checkpoint.layouts import PUBLISHED_SLA
from turbotrain.checkpoint.lora import LORA_FILE, read_lora, save_lora
from turbotrain.model.attention_config import AttentionConfig

SLA = AttentionConfig("sla", 0.25, 64, 64)
LAYERS = {"blocks.0.self_attn.q": (128, 128), "blocks.1.cross_attn.o": (128, 128), "blocks.1.ffn.0": (192, 128)}
P = "blocks.0.self_attn.attn_op.local_attn.proj_l"
RANK = 3


def change(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (rows, columns) in LAYERS.items():
        found[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        found[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    return found


def write(folder: Path, tensors: dict[str, Tensor], attention: AttentionConfig | None = None) -> Path:
    meta = CheckpointMeta(
        attention=(attention or AttentionConfig()).to_dict(),
        sampler={"sigma_max": 80.0, "times": [1.5], "ode": False},
        lineage=[{"stage": "rcm"}],
    )
    save_lora(folder / LORA_FILE, tensors, meta)
    return folder / LORA_FILE


def sums(base: dict[str, Tensor]) -> dict[str, Tensor]:
    given = change()
    return {
        name: tensor.float() + given[f"{module}.lora_B.weight"] @ given[f"{module}.lora_A.weight"]
        if (module := name.removesuffix(".weight")) in LAYERS
        else tensor
        for name, tensor in base.items()
    }


def exact_sum(base: dict[str, Tensor], name: str, weight: float) -> tuple[Tensor, Tensor]:
    """What `sums` says of one tensor in float64, and by how much float32 may miss it: a rounding for each of the RANK products
    and sums, for the scale and for the last sum."""
    exact, module = base[name].double(), name.removesuffix(".weight")
    if module not in LAYERS:
        return exact, torch.zeros_like(exact)
    up, down = (change()[f"{module}.{part}.weight"].double() for part in ("lora_B", "lora_A"))
    magnitude = exact.abs() + abs(weight) * up.abs() @ down.abs()
    return exact + weight * up @ down, 2**-24 * (2 * RANK + 2) * magnitude


def test_files_have_the_names_of_diffusers_and_come_back(tmp_path: Path) -> None:
    path = write(tmp_path, change())
    names = set(load_file(path))
    assert "transformer.blocks.0.attn1.to_q.lora_A.weight" in names
    assert "transformer.blocks.1.attn2.to_out.0.lora_B.weight" in names
    assert "transformer.blocks.1.ffn.net.0.proj.lora_A.weight" in names
    again, said = read_lora(path)
    assert said is not None
    assert said.lineage == [{"stage": "rcm"}]
    assert again.keys() == change().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in change().items())


@pytest.mark.parametrize("kind", ["comfyui", "lightx2v", "peft"])
def test_files_of_others_are_read_with_their_scales(kind: str, tmp_path: Path) -> None:
    tensors = {}
    for name, tensor in change().items():
        if kind == "comfyui":
            tensors[f"diffusion_model.{name}"] = tensor
            tensors[f"diffusion_model.{name.rsplit('.', 2)[0]}.alpha"] = torch.tensor(6.0)
        elif kind == "lightx2v":
            tensors[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor
        else:
            tensors[name.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.", "lora_B.default.")] = (
                tensor
            )
    save_file(tensors, tmp_path / "file.safetensors")
    found, said = read_lora(tmp_path / "file.safetensors")
    assert said is None
    scale = 6.0 / RANK if kind == "comfyui" else 1.0
    for name, tensor in change().items():
        assert torch.equal(found[name], scale * tensor if "lora_B" in name else tensor)


@pytest.mark.parametrize("layout", ["turbotrain", "official", "diffusers", "turbodiffusion"])
def test_the_sum_is_written_from_any_layout(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make("dense", tmp_path / "base")
    before = stored(base)
    if layout != "turbotrain":
        base = output_path(tmp_path, layout)
        convert(tmp_path / "base", base, layout)
    lora = write(tmp_path, change())
    given = ["--base", str(base), "--lora", str(lora), "--weight", "0.5", "-o", str(tmp_path / "out")]
    assert tool.main(given) == 0
    assert "written:" in capsys.readouterr().out
    for name, tensor in load_transformer(tmp_path / "out").state_dict().items():
        exact, bound = exact_sum(before, name, 0.5)
        assert ((tensor.double() - exact).abs() <= bound).all(), name
    meta = read_meta(tmp_path / "out")
    assert meta.sampler is not None
    assert meta.sampler["sigma_max"] == 80.0
    assert meta.lineage == [{"stage": "rcm"}, {"stage": "lora", "weight": 0.5, "files": [lora.name]}]


def test_the_bases_dtype_stays(tmp_path: Path) -> None:
    make("half", tmp_path / "base")
    lora = write(tmp_path, change())
    assert tool.main(["--base", str(tmp_path / "base"), "--lora", str(lora), "-o", str(tmp_path / "out")]) == 0
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, sums(before)[name].to(tensor.dtype)), name


def test_an_sla_adapter_brings_its_projections_and_its_attention(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("dense", tmp_path / "base")
    lora = write(tmp_path, {**change(), **projections(0.25)}, SLA)
    given = ["--base", str(tmp_path / "base"), "--lora", str(lora), "-o", str(tmp_path / "out")]
    assert tool.main(given) == 0
    model = load_transformer(tmp_path / "out")
    assert model.attention_config == SLA
    assert torch.equal(model.get_parameter(f"{P}.weight"), torch.full((128, 128), 0.25))
    assert tool.main([*given[:-1], str(tmp_path / "official"), "--to", "official"]) == 1
    assert "cannot hold all of it" in capsys.readouterr().err

    tensors = load_file(lora)
    save_file(tensors, lora)  # a file that does not say which attention: read as every file with P and without metadata
    assert tool.main([*given[:-1], str(tmp_path / "unsaid")]) == 0
    assert load_transformer(tmp_path / "unsaid").attention_config == PUBLISHED_SLA


def projections(value: float, width: int = 128) -> dict[str, Tensor]:
    return {
        f"blocks.{n}.self_attn.attn_op.local_attn.proj_l.{leaf}": torch.full(shape, value)
        for n in range(CONFIG.num_layers)
        for leaf, shape in (("weight", (width, width)), ("bias", (width,)))
    }


@pytest.mark.parametrize("kind", ["sla", "half"])
def test_p_moves_by_the_weight_from_the_bases_to_the_adapters(kind: str, tmp_path: Path) -> None:
    base = stored(make(kind, tmp_path / "base"))
    has_p = f"{P}.weight" in base
    assert has_p == (kind == "sla")
    lora = write(tmp_path, {**change(), **projections(0.3)}, SLA)
    for weight in (0.0, 0.5, 1.0):
        out = tmp_path / f"{weight}"
        given = ["--base", str(tmp_path / "base"), "--lora", str(lora), "--weight", str(weight), "-o", str(out)]
        assert tool.main(given) == 0
        found = stored(out)
        for name, target in projections(0.3).items():
            start = base[name] if has_p else torch.zeros_like(target)
            ends = {0.0: start, 1.0: target.to(start.dtype)}
            if weight in ends:
                assert torch.equal(found[name], ends[weight]), name
            torch.testing.assert_close(found[name], start + weight * (target - start))
        if weight == 0:
            assert all(torch.equal(found[name], tensor) for name, tensor in base.items()), "the base"
        assert load_transformer(out).attention_config == SLA


def test_a_dense_adapter_leaves_the_bases_attention(tmp_path: Path) -> None:
    make("sla", tmp_path / "base")
    given = ["--base", str(tmp_path / "base"), "--lora", str(write(tmp_path, change())), "-o", str(tmp_path / "out")]
    assert tool.main(given) == 0
    assert load_transformer(tmp_path / "out").attention_config == PUBLISHED_SLA


def test_what_is_no_adapter_of_this_network_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, sla = make("dense", tmp_path / "base"), make("sla", tmp_path / "sla")
    save(tmp_path / "two" / "high", network())
    save(tmp_path / "two" / "low", network(seed=1))
    good = change()
    name = "blocks.0.self_attn.q"
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "other layers": (
            {**good, **_pair("blocks.7.self_attn.q", 128, 128)},
            "of another network.*blocks.7.self_attn.q.*no such",
        ),
        "other width": (
            {**good, **_pair(name, 64, 64)},
            r"blocks.0.self_attn.q \(\(64, 3\) x \(3, 64\) for a layer of",
        ),
        "other projections": (
            {**good, **projections(0.5, 64)},
            r"proj_l.*\(\(64, 64\) for one of shape \(128, 128\)\)",
        ),
        "half": (
            {key: t for key, t in good.items() if key != f"{name}.lora_B.weight"},
            "blocks.0.self_attn.q has only lora_A",
        ),
        "difference": (
            {**good, "blocks.0.self_attn.k.diff": torch.zeros(1)},
            "1 tensors are no low-rank factors.*k.diff",
        ),
        "kohya": (
            {**good, "lora_unet_blocks_0_self_attn_q.lora_up.weight": torch.zeros(1)},
            "no low-rank factors.*lora_unet",
        ),
        "network": ({"patch_embedding.weight": torch.zeros(2)}, "no LoRA, it has no lora_A or lora_down"),
    }
    for kind, (tensors, words) in cases.items():
        save_file(tensors, tmp_path / f"{kind}.safetensors")
        on = sla if kind == "other projections" else base
        given = ["--base", str(on), "--lora", str(tmp_path / f"{kind}.safetensors"), "-o", str(tmp_path / "out")]
        assert tool.main(given) == 1, kind
        assert re.search(words, capsys.readouterr().err), kind
        assert not (tmp_path / "out").exists()
    lora = str(write(tmp_path, good))
    for where, words in (
        (tmp_path / "two", "holds two experts; name the one"),
        (make("int8_channel", tmp_path / "q"), "8-bit"),
    ):
        assert tool.main(["--base", str(where), "--lora", lora, "-o", str(tmp_path / "out")]) == 1
        assert words in capsys.readouterr().err


def _pair(name: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.zeros(RANK, columns), f"{name}.lora_B.weight": torch.zeros(rows, RANK)}


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, words in (
        (["--lora", "x", "--target", "y"], "not with --target"),
        (["--lora", "x", "--weight", "high=1", "low=2"], "not with two weights"),
        (["--target", "y"], "name --target and --anchor, or a --lora"),
    ):
        with pytest.raises(SystemExit) as stopped:
            tool.main(["--base", "b", "-o", str(tmp_path / "o"), *more])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


def test_an_adapter_in_place_of_a_network_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointProblem, match=r"tools/merge.py --base NETWORK --lora FILE"):
        convert(write(tmp_path, change()), tmp_path / "out", "official")
