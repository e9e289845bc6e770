"""Bad files are refused with the reason and the remedy; a write happens whole or not at all."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from turbotrain.checkpoint import (
    CheckpointMeta,
    CheckpointProblem,
    atomic,
    check_checkpoint,
    identify,
    inspect_checkpoint,
    io,
    load_tensor,
    load_transformer,
    read_checkpoint,
    read_meta,
    save_checkpoint,
)
from turbotrain.model.variants import VARIANTS, WanConfig
from turbotrain.model.wan import WanTransformer

CONFIG = WanConfig(
    dim=128, ffn_dim=64, num_heads=1, num_layers=1, text_dim=16, freq_dim=32, in_channels=4, out_channels=4
)


def write(folder: Path, config: WanConfig = CONFIG, **fields: Any) -> Path:
    torch.manual_seed(0)
    state = WanTransformer(config).state_dict()
    save_checkpoint(folder, state, CheckpointMeta(config=config.to_dict(), attention={}, **fields))
    return folder


class RunsCode:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"head.modulation": torch.zeros(1), "x": RunsCode(f"touch {mark}")}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(RunsCode(f"touch {mark}"), protocol=2))
    for name in ("evil.pth", "plain.pth"):
        for read in (load_transformer, read_checkpoint, inspect_checkpoint):
            with pytest.raises(CheckpointProblem, match=rf"{name}: refused.*system.*convert it to safetensors"):
                read(tmp_path / name)
    with pytest.raises(CheckpointProblem, match="shard 3: refused"):
        load_tensor((tmp_path / "evil.pth").read_bytes(), "shard 3")
    assert not mark.exists()


def test_weights_only_guards_what_the_scan_lets_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "ran"
    torch.save({"x": RunsCode(f"touch {mark}")}, tmp_path / "evil.pth")
    monkeypatch.setattr(io.header, "refuse_unsafe_pickle", lambda path: None)
    with pytest.raises(CheckpointProblem, match="refused"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_files(tmp_path: Path, keep: float) -> None:
    source = write(tmp_path / "whole") / "model.safetensors"
    torch.save(dict(WanTransformer(CONFIG).state_dict()), tmp_path / "whole.pth")
    for file, name in ((source, "cut.safetensors"), (tmp_path / "whole.pth", "cut.pth")):
        data = file.read_bytes()
        (tmp_path / name).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        for read in (load_transformer, inspect_checkpoint):
            with pytest.raises(CheckpointProblem, match=rf"{name}: (truncated|its safetensors header)"):
                read(tmp_path / name)


def test_damaged_headers(tmp_path: Path) -> None:
    header = b"{not json}"
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointProblem, match="header is damaged"):
        read_checkpoint(tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors", metadata={"turbotrain": "{"})
    with pytest.raises(CheckpointProblem, match="not JSON"):
        read_checkpoint(tmp_path / "b.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors", metadata={"turbotrain": '{"flux": 1}'})
    with pytest.raises(CheckpointProblem, match="unknown fields flux"):
        read_checkpoint(tmp_path / "c.safetensors")


def test_old_torch_files_load(tmp_path: Path) -> None:
    state = dict(WanTransformer(CONFIG).state_dict())
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loaded = load_transformer(tmp_path / "old.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointProblem, match="does not exist"):
        load_transformer(tmp_path / "none")
    with pytest.raises(CheckpointProblem, match="is it a checkpoint folder"):
        load_transformer(tmp_path)
    for stage in ("data", "rcm", "sla"):
        (tmp_path / "run" / stage / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "data" / "checkpoint" / "dataset.safetensors").touch()  # shards are no network
    for stage in ("rcm", "sla"):
        (tmp_path / "run" / stage / "checkpoint" / "model.safetensors").touch()
    for meant, folders in {"run/rcm": ["rcm"], "run": ["rcm", "sla"], "run/data": []}.items():
        with pytest.raises(CheckpointProblem, match="is it a checkpoint folder") as caught:
            load_transformer(tmp_path / meant)
        inner = " or ".join(str(tmp_path / "run" / stage / "checkpoint") for stage in folders)
        assert str(caught.value).endswith(f"? Did you mean {inner}?" if inner else "checkpoint folder?")
    with pytest.raises(CheckpointProblem, match="training data, no network"):
        load_transformer(tmp_path / "run" / "data" / "checkpoint")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointProblem, match=r"'\.txt' is no weights file"):
        load_transformer(tmp_path / "notes.txt")
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointProblem, match=r"a\.safetensors, b\.safetensors"):
        load_transformer(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointProblem, match="holds a list"):
        load_transformer(tmp_path / "list.pth")


@pytest.mark.parametrize(
    "names", [("high", "low"), ("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")]
)
def test_two_experts(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        write(tmp_path / name)
    with pytest.raises(CheckpointProblem, match="holds two experts") as caught:
        load_transformer(tmp_path)
    assert all(str(tmp_path / name) in str(caught.value) for name in names)
    assert load_transformer(tmp_path / names[0]).config == CONFIG
    assert len(inspect_checkpoint(tmp_path).weights) == 2


def test_diffusers_pipeline_folder(tmp_path: Path) -> None:
    write(tmp_path / "transformer")
    assert load_transformer(tmp_path).config == CONFIG


def test_wrong_variant_is_named_before_torch(tmp_path: Path) -> None:
    shapes = write(tmp_path / "shapes", VARIANTS["shapes"].config, variant="shapes")
    assert check_checkpoint(shapes, "shapes").metadata is not None
    other = write(tmp_path / "other")
    code = (
        "import sys\nfrom turbotrain.checkpoint.header import CheckpointProblem, check_checkpoint\n"
        f"try:\n    check_checkpoint({str(other)!r}, 'shapes')\n"
        "except CheckpointProblem as problem:\n    print(problem)\nassert 'torch' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "1 layers" in said
    assert "variant=shapes expects shapes (dim 128" in said
    (other / "model.safetensors").rename(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointProblem, match=r"expects wan2\.1_t2v_1\.3b"):
        check_checkpoint(tmp_path / "foreign.safetensors", "wan2.1_t2v_1.3b")


@pytest.mark.parametrize("name", ["wan2.1_t2v_14b", "Wan2.2-T2V-A14B/low_noise_model"])
def test_equal_dimensions_are_told_apart_by_place(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"wan2.1_t2v_14b": CONFIG, "wan2.2_t2v_a14b": CONFIG}
    monkeypatch.setattr(identify, "variants_with", lambda config: [v for v, c in small.items() if c == config])
    folder = tmp_path / name
    folder.mkdir(parents=True)
    save_file(dict(WanTransformer(CONFIG).state_dict()), folder / "model.safetensors")
    assert read_meta(folder).variant == ("wan2.2_t2v_a14b" if "2.2" in name else "wan2.1_t2v_14b")


def test_load_tensor(tmp_path: Path) -> None:
    torch.save(torch.arange(3), tmp_path / "a.pt")
    assert load_tensor((tmp_path / "a.pt").read_bytes(), "a").tolist() == [0, 1, 2]
    torch.save({}, tmp_path / "b.pt")
    with pytest.raises(CheckpointProblem, match="b: holds a dict"):
        load_tensor((tmp_path / "b.pt").read_bytes(), "b")
    with pytest.raises(CheckpointProblem, match="truncated"):
        load_tensor(b"PK\x03\x04", "c")


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", lineage=[{"stage": "old"}])
    before = (folder / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        for target in (folder, tmp_path / "fresh"):
            with pytest.raises(OSError, match="cannot write"):
                write(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["out"]
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("rename_works", [True, False])
def test_systems_that_cannot_exchange_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename_works: bool
) -> None:
    folder = write(tmp_path / "out", lineage=[{"stage": "old"}])
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if Path(target) == folder and ".old." not in str(source):
            raise OSError("the disk went away")
        rename(source, target)

    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    if not rename_works:
        monkeypatch.setattr(atomic.os, "rename", failing)
        with pytest.raises(OSError, match=r"disk went away.*nothing was changed"):
            write(folder, lineage=[{"stage": "new"}])
    else:
        write(folder, lineage=[{"stage": "new"}])
    assert read_meta(folder).lineage == [{"stage": "new" if rename_works else "old"}]
    assert os.listdir(tmp_path) == ["out"]


def test_replacing_keeps_files_that_are_not_ours(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", lineage=[{"stage": "old"}])
    write(folder, lineage=[{"stage": "new"}])
    assert os.listdir(tmp_path) == ["out"]
    (folder / "my_notes.txt").write_text("precious")
    write(folder, lineage=[{"stage": "newer"}])
    assert read_meta(folder).lineage == [{"stage": "newer"}]
    assert [file.read_text() for file in tmp_path.rglob("my_notes.txt")] == ["precious"]


def test_killed_writer_leaves_old_or_new(tmp_path: Path) -> None:
    """Kill a process that saves in a loop, at odd moments: what lies in the folder always loads."""
    folder = write(tmp_path / "out")
    code = (
        "import torch, sys\nfrom turbotrain.checkpoint import CheckpointMeta, save_checkpoint, read_checkpoint\n"
        f"state, meta = read_checkpoint({str(folder)!r})\nprint('ready', flush=True)\n"
        f"while True: save_checkpoint({str(folder)!r}, state, meta)"
    )
    for delay in (0.013, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        assert load_transformer(folder).config == CONFIG
