"""Host memory while converting, and the containers that are read and written a tensor at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conversions import assert_same_bits, make, network, stored
from safetensors.torch import load_file

from turbotrain.checkpoint import CheckpointProblem
from turbotrain.checkpoint.convert import convert
from turbotrain.checkpoint.sinks import write_pickle, write_safetensors, write_shards
from turbotrain.checkpoint.stream import Entry, open_contents

SHARD = 48 * 2**20
# About 200 MiB: a network of wide blocks, whose largest tensor is 9 MiB.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from turbotrain.checkpoint.convert import convert
from turbotrain.checkpoint.merge import merge
from turbotrain.checkpoint.sinks import write_pickle
from turbotrain.checkpoint.stream import Entry
from turbotrain.checkpoint.structure import expected_shapes
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import WanConfig

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

folder, shard = Path(sys.argv[1]), int(sys.argv[2])
config = WanConfig(dim=768, ffn_dim=3072, num_heads=6, num_layers=5, text_dim=512)
entries = {
    name: Entry(shape, "float32", lambda shape=shape: torch.randn(shape))
    for name, shape in expected_shapes(config, AttentionConfig()).items()
}
write_pickle(folder / "source.pth", entries)
del entries
peaks = {}
for source, to, output, options in (
    ("source.pth", "diffusers", "diffusers", {}),
    ("diffusers", "turbotrain", "ours", {}),
    ("ours", "turbodiffusion", "back.pth", {}),
    ("ours", "turbotrain", "half", {"dtype": "bfloat16", "lossy": True}),
):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    convert(folder / source, folder / output, to, max_shard_bytes=shard, **options)
    peaks[output] = status("VmHWM") - before
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
merge(*(folder / name for name in ("ours", "back.pth", "diffusers", "merged")), {"": 0.5}, max_shard_bytes=shard)
peaks["merged"] = status("VmHWM") - before
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone tells a process's peak memory")
def test_memory_stays_below_a_shard(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(SHARD)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    shards = list(tmp_path.glob("diffusers/transformer/*.safetensors"))
    assert len(shards) >= 4
    largest = max(shard.stat().st_size for shard in shards)
    peaks = json.loads(done.stdout)
    assert max(peaks.values()) < 1.3 * largest, {name: peak / largest for name, peak in peaks.items()}


def numbers() -> dict[str, torch.Tensor]:
    wide = torch.randn(6, 5)
    return {
        "float": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(7, dtype=torch.int8),
        "view": wide[2:4],
        "transposed": wide.t(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


def test_torch_files_are_read_in_parts(tmp_path: Path) -> None:
    tensors = numbers()
    torch.save({"state_dict": tensors, "iteration": 3}, tmp_path / "a.pth")
    contents = open_contents(tmp_path / "a.pth")
    assert not contents.whole
    assert_same_bits(
        {n: e.read() for n, e in contents.entries.items()}, {n: t.contiguous() for n, t in tensors.items()}
    )


def test_old_torch_files_are_read_whole_and_say_so(tmp_path: Path) -> None:
    torch.save(dict(network().state_dict()), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    result = convert(tmp_path / "old.pth", tmp_path / "ours", "turbotrain", verified=True)
    assert any("older than torch 1.6" in note for note in result.notes)
    assert_same_bits(stored(tmp_path / "ours"), dict(network().state_dict()))


def test_containers_are_what_other_readers_expect(tmp_path: Path) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in numbers().items()}
    entries = {name: Entry.of(tensor) for name, tensor in tensors.items()}
    write_pickle(tmp_path / "a.pth", entries)
    assert zipfile.ZipFile(tmp_path / "a.pth").testzip() is None
    for mmap in (False, True):
        assert_same_bits(torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap), tensors)
    write_safetensors(tmp_path / "a.safetensors", entries, {"format": "pt"})
    assert_same_bits(load_file(tmp_path / "a.safetensors"), tensors)
    for name in ("a.pth", "a.safetensors"):
        assert_same_bits({n: e.read() for n, e in open_contents(tmp_path / name).entries.items()}, tensors)
    with pytest.raises(CheckpointProblem, match="float8_e4m3fn has no place"):
        write_pickle(tmp_path / "b.pth", {"x": Entry.of(torch.zeros(2).to(torch.float8_e4m3fn))})


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    entries = {f"t{number}": Entry.of(torch.full((100,), float(number))) for number in range(7)}
    files = write_shards(tmp_path, "w", entries, {}, 900)
    assert [len(load_file(file)) for file in files] == [2, 2, 2, 1]
    index = json.loads((tmp_path / "w.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    assert {name: load_file(tmp_path / file)[name][0].item() for name, file in index["weight_map"].items()} == {
        f"t{number}": number for number in range(7)
    }


@pytest.mark.parametrize("what", ["elsewhere", "absent", "unlisted", "twice"])
def test_shards_that_do_not_fit_their_index(what: str, tmp_path: Path) -> None:
    convert(make("dense", tmp_path / "ours"), tmp_path / "sharded", "turbotrain", max_shard_bytes=300_000)
    file = tmp_path / "sharded" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = list(index["weight_map"])
    if what == "elsewhere":
        index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    elif what == "absent":
        index["weight_map"]["blocks.7.modulation"] = index["weight_map"][names[0]]
    elif what == "unlisted":
        del index["weight_map"][names[0]]
    else:
        (tmp_path / "sharded" / "copy.safetensors").write_bytes(
            (tmp_path / "sharded" / index["weight_map"][names[0]]).read_bytes()
        )
        index["weight_map"]["again"] = "copy.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointProblem, match=r"does not fit its shards|as another shard does"):
        open_contents(tmp_path / "sharded")
