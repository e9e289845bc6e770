"""Bad input of tools/convert.py: one line that names what is wrong, exit status 1 or 2, nothing written; torch is not needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import convert as tool
import pytest
import torch
from conversions import CONFIG, make, network, save
from safetensors.torch import save_file

from turbotrain.checkpoint.layouts import to_layout
from turbotrain.checkpoint.stream import Entry
from turbotrain.model.variants import WanConfig

State = dict[str, torch.Tensor]


class RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def names(*listed: str) -> Callable[[Path], Path]:
    """A file with tensors of these names and nothing in them."""

    def build(folder: Path) -> Path:
        save_file({name: torch.zeros(2) for name in listed}, folder / "other.safetensors")
        return folder / "other.safetensors"

    return build


def changed(change: Callable[[State], object], suffix: str = ".safetensors") -> Callable[[Path], Path]:
    """A whole network of which something was changed."""

    def build(folder: Path) -> Path:
        state = {name: tensor.clone() for name, tensor in network().state_dict().items()}
        change(state)
        path = folder / f"changed{suffix}"
        torch.save(state, path) if suffix == ".pth" else save_file(state, path)
        return path

    return build


def truncated(suffix: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        path = changed(lambda state: None, suffix)(folder)
        path.write_bytes(path.read_bytes()[:-1000])
        return path

    return build


def sharded(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        ours = save(folder / "ours", network())
        tool.main([str(ours), "--to", "turbotrain", "-o", str(folder / "cut"), "--max-shard-gb", "0.0003"])
        change(folder / "cut")
        return folder / "cut"

    return build


def pair(high: WanConfig, low: WanConfig) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        for name, config in (("high", high), ("low", low)):
            save(folder / "pair" / name, network(config))
        return folder / "pair"

    return build


def written(folder: Path, name: str, content: bytes = b"") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def evil(folder: Path) -> Path:
    torch.save({"head.modulation": torch.zeros(1), "x": RunsCode()}, folder / "evil.pth")
    return folder / "evil.pth"


def two_files(folder: Path) -> Path:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors")
    return folder


def mixed(state: State) -> None:
    state.update({name: t.clone() for name, t in to_layout(state, "diffusers").items() if "condition" in name})


def corrupt_index(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["blocks.0.modulation"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BIGGER = WanConfig(
    dim=128, ffn_dim=256, num_heads=1, num_layers=2, text_dim=16, freq_dim=32, in_channels=4, out_channels=4
)
# What is given, what is said. None of these needs torch.
SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none", "does not exist"),
    "empty folder": (lambda folder: written(folder, "x/notes.md").parent, "is it a checkpoint folder"),
    "other suffix": (lambda folder: written(folder, "a.gguf", b"GGUF"), r"'\.gguf' is no weights file"),
    "empty file": (lambda folder: written(folder, "a.safetensors"), "truncated or not a safetensors file"),
    "noise": (lambda folder: written(folder, "a.safetensors", b"\xff" * 99), "truncated or not a safetensors file"),
    "truncated": (truncated(".safetensors"), "truncated"),
    "truncated pickle": (truncated(".pth"), "truncated or not a torch checkpoint"),
    "pickle that runs code": (evil, "refused, because loading this pickle would run .*system"),
    "several files": (two_files, r"several weights files and no shard index"),
    "distributed": (lambda folder: written(folder, "d/__0_0.distcp").parent, "dcp_to_torch"),
    "shard missing": (sharded(lambda folder: sorted(folder.glob("*-of-*"))[1].unlink()), "shards missing"),
    "index incomplete": (sharded(corrupt_index), "does not fit its shards"),
    "index damaged": (
        sharded(lambda f: written(f, "model.safetensors.index.json", b"{")),
        "not a readable shard index",
    ),
    "lora": (names("blocks.0.self_attn.q.lora_A.weight"), "a LoRA.*merge it into its base network"),
    "kohya lora": (names("lora_unet_blocks_0_self_attn_q.lora_down.weight"), "a LoRA"),
    "vae": (names("encoder.conv1.weight", "decoder.conv1.weight"), "a VAE"),
    "text encoder": (names("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"), "a text encoder"),
    "vace": (changed(lambda s: s.update({"vace_blocks.0.after_proj.weight": torch.zeros(2)})), "a VACE network"),
    "unknown layout": (names("down.0.weight", "up.0.weight"), "not a Wan transformer"),
    "mixed layouts": (changed(mixed), "mixes diffusers' names with official ones"),
    "twice": (changed(lambda s: s.update({"net.head.head.bias": torch.zeros(16)})), "both mean head.head.bias"),
    "experts differ": (pair(CONFIG, BIGGER), "do not belong together, their network differs"),
    "one expert": (lambda folder: save(folder / "x" / "high", network()).parent, r"there is only high/"),
    "heads unknown": (
        changed(lambda s: s.update({"patch_embedding.weight": torch.zeros(96, 4, 1, 2, 2)})),
        "number of heads cannot be told",
    ),
    "tensor missing": (changed(lambda s: s.pop("blocks.1.norm3.bias")), r"1 missing: blocks\.1\.norm3\.bias"),
    "tensor unexpected": (
        changed(lambda s: s.update({"blocks.0.gate.weight": torch.zeros(2)})),
        r"1 unexpected: blocks\.0\.gate\.weight",
    ),
    "shape": (
        changed(lambda s: s.update({"head.head.bias": torch.zeros(5)})),
        r"head\.head\.bias \(5,\) instead of \(16,\)",
    ),
    "scale missing": (
        changed(lambda s: s.update({"blocks.0.ffn.0.int8_weight": s.pop("blocks.0.ffn.0.weight").to(torch.int8)})),
        r"1 missing: blocks\.0\.ffn\.0\.scale",
    ),
    "packed weights": (
        changed(
            lambda s: s.update(
                {
                    "blocks.0.ffn.0.weight": s["blocks.0.ffn.0.weight"].to(torch.uint8),
                    "blocks.0.ffn.0.weight_scale": torch.ones(192, 1),
                }
            )
        ),
        "only int8 and float8_e4m3fn",
    ),
}
# These are found when tensors are read.
LATER: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nan": (
        changed(lambda s: s["blocks.1.ffn.0.weight"].fill_(float("nan"))),
        r"blocks\.1\.ffn\.0\.weight.*not finite",
    ),
    "nan in a pickle": (
        changed(lambda s: s["head.modulation"].fill_(float("inf")), ".pth"),
        r"head\.modulation.*not finite",
    ),
}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        status = tool.main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return status, said


@pytest.mark.parametrize("case", [*SOURCES, *LATER])
def test_bad_sources(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, expected = (SOURCES | LATER)[case]
    source = build(tmp_path)
    output = tmp_path / "new" / "result"
    capsys.readouterr()
    status, said = refusal([str(source), "--to", "turbotrain", "-o", str(output)], capsys)
    assert status == 1
    assert said.startswith("failed: ")
    assert re.search(expected, said), said
    assert not output.exists()
    assert not list(output.parent.glob("*"))
    assert not Path("ran").exists()


def test_bad_sources_are_told_without_torch(tmp_path: Path, work_seconds: Callable[[], float]) -> None:
    built: list[str] = []
    for case, (build, _) in SOURCES.items():
        (tmp_path / case).mkdir()
        built.append(str(build(tmp_path / case)))
    code = (
        "import sys, convert\n"
        f"for path in {built!r}:\n"
        f"    assert convert.main([path, '--inspect']) == 1, path\n"
        f"    assert convert.main([path, '--to', 'official', '-o', {str(tmp_path / 'new')!r}]) == 1, path\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "kernels", root / "tools")))
    started = work_seconds()
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) >= len(built)
    assert all(line.startswith("failed: ") for line in lines)
    assert work_seconds() - started < 20  # all of them; each is to take less than 5


OUTPUTS: dict[str, tuple[list[str], str]] = {
    "exists": (["--to", "official", "-o", "full"], r"full: exists; --force replaces it"),
    "file for a folder": (["--to", "official", "-o", "full/file"], "is a file; name another output"),
    "folder for a file": (["--to", "rcm", "-o", "folder.pth"], "is a folder; name another output"),
    "suffix": (["--to", "turbodiffusion", "-o", "x"], r"is one \.pth file"),
    "suffix of a folder": (
        ["--to", "diffusers", "-o", "x.safetensors"],
        r"is a folder; name the output without \.safetensors",
    ),
    "under a file": (["--to", "official", "-o", "full/file/x"], "is no folder that can be written to"),
    "the source": (["--to", "turbotrain", "-o", "ours", "--force"], "would replace"),
    "above the source": (["--to", "turbotrain", "-o", ".", "--force"], "would replace"),
    "wrong variant": (
        ["--to", "turbotrain", "-o", "x", "--variant", "wan2.1_t2v_1.3b"],
        "is wan2.1_t2v_1.3b.*leave it out",
    ),
}
USAGES: dict[str, tuple[list[str], str]] = {
    "nothing to do": ([], "say either --inspect or --to"),
    "both": (["--inspect", "--to", "official", "-o", "x"], "say either --inspect or --to"),
    "no output": (["--to", "official"], "--output: missing"),
    "unknown layout": (["--to", "flux", "-o", "x"], "invalid choice: 'flux'"),
    "unknown variant": (["--to", "official", "-o", "x", "--variant", "wan3"], "invalid choice: 'wan3'"),
    "unknown dtype": (["--to", "official", "-o", "x", "--dtype", "int3"], "invalid choice: 'int3'"),
    "unknown option": (["--inspect", "--fast"], "unrecognized arguments: --fast"),
    "shard size": (["--to", "official", "-o", "x", "--max-shard-gb", "0"], "must be above 0"),
    "json": (["--to", "official", "-o", "x", "--json"], "--json goes with --inspect"),
}


@pytest.mark.parametrize("case", [*OUTPUTS, *USAGES])
def test_bad_outputs_and_options(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "ours", network())
    written(tmp_path, "full/file")
    (tmp_path / "folder.pth").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments, expected = (OUTPUTS | USAGES)[case]
    status, said = refusal(["ours", *arguments], capsys)
    assert status == (1 if case in OUTPUTS else 2)
    assert re.search(expected, said), said
    assert sorted(tmp_path.rglob("*")) == before


def test_patches_that_a_layout_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(__file__).parents[2] / "recipes" / "assets" / "shapes_teacher"
    status, said = refusal([str(source), "--to", "turbodiffusion", "-o", str(tmp_path / "a.pth")], capsys)
    assert (status, "patches of (1, 2, 2) only" in said) == (1, True)
    status, said = refusal(
        [str(make("int8_channel", tmp_path / "q")), "--to", "official", "-o", str(tmp_path / "x")], capsys
    )
    assert (status, "holds no 8-bit weights; --dtype bfloat16 --lossy" in said) == (1, True)


def test_a_full_disk_is_told_before_and_a_failing_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(save(tmp_path / "ours", network()))
    arguments = [source, "--to", "turbotrain", "-o", str(tmp_path / "new" / "x")]
    with monkeypatch.context() as patch:
        patch.setattr("turbotrain.checkpoint.targets.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        assert refusal(arguments, capsys)[1].endswith("its disk has 0.0 GiB left")

    def fails(name: str, entry: Entry) -> memoryview:
        raise OSError("the disk went away")

    monkeypatch.setattr("turbotrain.checkpoint.sinks._data", fails)
    for layout, name in (("turbotrain", "x"), ("comfyui", "x.safetensors"), ("rcm", "x.pth")):
        said = refusal([source, "--to", layout, "-o", str(tmp_path / "new" / name)], capsys)[1]
        assert "the disk went away" in said
        assert "nothing was changed" in said
    assert not list((tmp_path / "new").iterdir())
