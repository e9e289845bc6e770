"""Bad files, folders and devices: one line that names the file and a remedy, soon, and nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recipe_world import (
    LATENT,
    ROOT,
    World,
    arguments,
    environment,
    read_metrics,
    read_status,
    samples,
    train_here,
    weights,
    write_data,
)
from shard_damage import RunsCode, rewrite, tensor_bytes

import turbotrain.stages.sla  # noqa: F401  (so that no test's time includes importing it)
from turbotrain.data.latents import LatentDataset
from turbotrain.data.writing import Sample
from turbotrain.model.variants import VARIANTS
from turbotrain.model.wan import WanTransformer
from turbotrain.training.log import StageLog

SHARD = "train-000001.tar"


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 100])


# ---- seen from headers: before torch is imported, before a folder is made -------------------------------------------

SHARD_DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing folder": (shutil.rmtree, ("data.path", "no such file or folder")),
    "no tar": (lambda data: [shard.unlink() for shard in data.glob("*.tar")], ("no *.tar shards", "data.path")),
    "no index": (lambda data: (data / "dataset.safetensors").unlink(), ("dataset.safetensors", "Build the shards")),
    "torn index": (lambda data: truncate(data / "dataset.safetensors"), ("dataset.safetensors", "truncated")),
    "corrupt": (lambda data: (data / SHARD).write_bytes(b"\x07" * 4096), (SHARD, "not a readable tar", "again")),
    "no bytes": (lambda data: (data / SHARD).write_bytes(b""), (SHARD, "not a readable tar", "again")),
    "truncated": (lambda data: truncate(data / SHARD), (SHARD, "again")),
    "empty tar": (lambda data: tarfile.open(data / SHARD, "w").close(), (SHARD, "holds no samples", "remove it")),
    "lost shard": (lambda data: (data / SHARD).unlink(), ("holds 4 samples", "says 8", "again")),
    "missing part": (
        lambda data: rewrite(data / SHARD, lambda name, old: None if name == "000000005.embed.pt" else old),
        (SHARD, "000000005", "embed.pt", "again"),
    ),
}


def failed_before_it_began(output: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for word in words:
        assert word in error, error
    assert not output.exists()


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_bad_shards_are_refused_by_their_headers(
    damage: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], work_seconds: Callable[[], float]
) -> None:
    spoil, words = SHARD_DAMAGE[damage]
    data = Path(shutil.copytree(world.shards, tmp_path / "data"))
    spoil(data)
    began = work_seconds()
    assert train_here(*arguments(World(world.teacher, data), tmp_path / "out")) in (1, 2)
    assert work_seconds() - began < 5
    failed_before_it_began(tmp_path / "out", capsys, words)


def test_a_corrupt_header_within_a_shard_is_noticed(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """tarfile takes it for the end of the archive."""
    data = Path(shutil.copytree(world.shards, tmp_path / "data"))
    content = bytearray((data / SHARD).read_bytes())
    with tarfile.open(data / SHARD) as archive:
        third_sample = archive.getmember("000000006.embed.pt").offset
    content[third_sample : third_sample + 512] = b"\x07" * 512
    (data / SHARD).write_bytes(bytes(content))
    assert train_here(*arguments(World(world.teacher, data), tmp_path / "out")) in (1, 2)
    failed_before_it_began(tmp_path / "out", capsys, ("again",))


def test_shards_of_another_resolution(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*arguments(world, tmp_path / "out", "data.width=128")) in (1, 2)
    failed_before_it_began(tmp_path / "out", capsys, ("(24, 4, 8, 8)", "expected (24, 4, 8, 16)", "resolution"))


def bad_teachers(world: World, folder: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    folder.mkdir()
    torn = Path(shutil.copytree(world.teacher, folder / "torn"))
    truncate(torn / "model.safetensors")
    (folder / "empty").mkdir()
    (folder / "text.safetensors").write_text("not a checkpoint")
    with (folder / "evil.pth").open("wb") as file:
        pickle.dump({"weight": RunsCode(folder / "mark")}, file)
    return {
        "missing": (folder / "nowhere", ("model.teacher", "no such file or folder")),
        "truncated": (torn, ("truncated", "again")),
        "empty": (folder / "empty", ("no .safetensors", "checkpoint folder?")),
        "no checkpoint": (folder / "text.safetensors", ("not a safetensors file", "again")),
        "pickle": (folder / "evil.pth", ("refused", "mkdir", "safetensors")),
    }


@pytest.mark.parametrize("case", ["missing", "truncated", "empty", "no checkpoint", "pickle"])
def test_bad_teachers_are_refused_by_their_headers(
    case: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], work_seconds: Callable[[], float]
) -> None:
    path, words = bad_teachers(world, tmp_path / "bad")[case]
    began = work_seconds()
    assert train_here(*arguments(World(path, world.shards), tmp_path / "out")) in (1, 2)
    assert work_seconds() - began < 5
    failed_before_it_began(tmp_path / "out", capsys, (path.name, *words))
    assert not (tmp_path / "bad" / "mark").exists(), "code was run"


def test_a_teacher_of_another_variant(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = arguments(world, tmp_path / "out", "model=wan2.1_t2v_1.3b", f"model.teacher={world.teacher}")
    assert train_here(*overrides) in (1, 2)
    failed_before_it_began(tmp_path / "out", capsys, (str(world.teacher), "shapes", "variant=wan2.1_t2v_1.3b"))


def test_files_are_refused_without_torch(world: World, tmp_path: Path) -> None:
    """One process asks for all of it: so the answers come within a second, torch or not."""
    data = Path(shutil.copytree(world.shards, tmp_path / "data"))
    truncate(data / SHARD)
    commands = [
        arguments(World(path, world.shards), tmp_path / "out")
        for path, _ in bad_teachers(world, tmp_path / "b").values()
    ]
    commands.append(arguments(World(world.teacher, data), tmp_path / "out"))
    commands.append(arguments(world, Path("/proc/here")))
    script = (
        "import sys; from turbotrain.cli import train_main\n"
        f"for arguments in {commands!r}:\n"
        "    assert train_main(arguments) in (1, 2)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == len(commands)


# ---- seen when they are read: the stage has begun, and leaves nothing that could be taken for a result --------------


def broken_sample(world: World, folder: Path, latent: bytes) -> World:
    data = Path(shutil.copytree(world.shards, folder / "data"))
    rewrite(data / SHARD, lambda name, old: latent if name == "000000006.latent.pt" else old)
    return World(world.teacher, data)


@pytest.mark.parametrize("case", ["shape", "nan", "too large", "pickle", "not a tensor", "garbage"])
def test_bad_samples(
    case: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], work_seconds: Callable[[], float]
) -> None:
    good = samples()[6].latent_CTHW
    assert good is not None
    mark = tmp_path / "mark"
    latent, words = {
        "shape": (tensor_bytes(good[..., :-1].clone()), ("shape (24, 4, 8, 7)", "expected (24, 4, 8, 8)")),
        "nan": (tensor_bytes(good.clone().fill_(float("nan"))), ("NaN", "again")),
        "too large": (tensor_bytes(good * 1e6), ("too large for float16", "again")),
        "pickle": (pickle.dumps(RunsCode(mark)), ("refused", "safetensors")),
        "not a tensor": (tensor_bytes([1, 2]), ("list", "again")),  # type: ignore[arg-type]
        "garbage": (b"\x00" * 100, ("refused", "safetensors")),
    }[case]
    began = work_seconds()
    assert train_here(*arguments(broken_sample(world, tmp_path, latent), tmp_path / "out", "stages=[sla]")) == 1
    assert work_seconds() - began < 5
    error = capsys.readouterr().err
    assert error.startswith("failed: ")
    assert error.count("\n") == 1
    for word in (SHARD, "000000006", *words):
        assert word in error, error
    assert not mark.exists(), "code was run"
    assert {path.name for path in (tmp_path / "out" / "run" / "sla").iterdir()} == {"stage.json"}
    assert read_status(tmp_path / "out" / "run" / "sla")["status"] == "running"


def test_bad_samples_within_the_limit_are_skipped_and_counted(world: World, tmp_path: Path) -> None:
    nan = tensor_bytes(torch.full(LATENT, float("nan")))
    broken = broken_sample(world, tmp_path, nan)
    arguments_ = arguments(broken, tmp_path / "out", "stages=[sla]", "data.max_bad_samples=1", "sla.steps=2")
    assert train_here(*arguments_) == 0
    assert [line["bad_samples"] for line in read_metrics(tmp_path / "out" / "run" / "sla")] == [1, 1]


def test_samples_with_odd_file_names(world: World, tmp_path: Path) -> None:
    """Shell and URL characters in a path mean themselves."""
    data = write_data(tmp_path / "a {b,c} 100% #1?", [Sample(s.latent_CTHW, s.embed_LD, s.prompt) for s in samples(5)])
    dataset = LatentDataset(data)
    assert len(dataset) == 5
    torch.testing.assert_close(dataset.batch([4]).latent_BCTHW[0], samples(5)[4].latent_CTHW.half().float())  # type: ignore[union-attr]
    assert dataset.batch([4]).prompts == ["prompt 4"]


def test_a_pickled_teacher_of_other_dimensions(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pickle shows its dimensions only when it is loaded."""
    smaller = dataclasses.replace(VARIANTS["shapes"].config, num_layers=2)
    torch.save(WanTransformer(smaller).state_dict(), tmp_path / "other.pth")
    overrides = arguments(World(tmp_path / "other.pth", world.shards), tmp_path / "out", "stages=[sla]")
    assert train_here(*overrides) == 1
    error = capsys.readouterr().err
    for word in ("other.pth", "2 layers", "model.variant=shapes", "4 layers"):
        assert word in error, error


# ---- places and devices ---------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", Path("/proc/out")):
        assert train_here(*arguments(world, output)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"usage: output_dir={str(output)!r}: cannot write there (")
        assert "choose another output_dir" in error
        assert error.count("\n") == 1


def test_a_full_disk_keeps_the_run_resumable(
    world: World, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert train_here(*arguments(world, tmp_path, "stages=[sla]")) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "state/step_00000001: the training state could not be written" in error
    assert "free some space" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run" / "sla" / "state").iterdir())
    assert train_here(*arguments(world, tmp_path, "stages=[sla]")) == 0
    resumed, expected = weights(tmp_path / "run" / "sla"), weights(whole / "sla")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_full_disk_in_the_log(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StageLog, "record", full)
    assert train_here(*arguments(world, tmp_path, "stages=[sla]")) == 1
    error = capsys.readouterr().err
    for word in (str(tmp_path / "run" / "sla"), "No space left on device", "free some space", "same command"):
        assert word in error, error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*arguments(world, tmp_path / "out", "launch.device=cuda")) == 2
    failed_before_it_began(tmp_path / "out", capsys, ("launch.device='cuda'", "launch.device=cpu"))


def test_an_input_that_no_stage_provides(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*arguments(world, tmp_path / "out", "stages=[quantize]")) == 2
    failed_before_it_began(tmp_path / "out", capsys, ("quantize needs a trained student", "rcm"))
    assert train_here(*arguments(world, tmp_path / "out", "stages=[evaluate]")) == 2
    failed_before_it_began(tmp_path / "out", capsys, ("evaluate needs a VAE and a text encoder", "model.codec"))
    assert train_here(*arguments(world, tmp_path / "out", "data.path=")) == 2
    failed_before_it_began(tmp_path / "out", capsys, ("sla needs shards of latents", "data.path"))


def test_a_codec_to_go_on_from_has_all_its_parts(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text encoder is copied when the VAE has been trained: that it is missing must not show only then."""
    (tmp_path / "start" / "vae").mkdir(parents=True)
    overrides = arguments(world, tmp_path / "out", "stages=[codec]", f"codec.start={tmp_path / 'start'}")
    assert train_here(*overrides) == 2
    failed_before_it_began(tmp_path / "out", capsys, ("codec.start=", "no codec in it", "text_encoder/"))


def test_an_interruption_says_how_to_continue(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StageLog, "record", interrupted)
    assert train_here(*arguments(world, tmp_path, "stages=[sla]")) == 1
    assert capsys.readouterr().err == "interrupted: the same command continues\n"
