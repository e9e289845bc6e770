"""Everything that can be wrong with a shard or a sample, as functions that do it."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch

from turbotrain.data.writing import Sample, write_shards

LATENT, EMBED = (4, 3, 2, 2), (5, 6)
SHARD = "train-000001.tar"
KEY = "000000006"  # the third of the four samples in SHARD


class RunsCode:
    """What an attacker pickles: loading it would make a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def samples(count: int = 10, shape: tuple[int, ...] = LATENT) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    return [
        Sample(torch.randn(shape, generator=generator), torch.randn(EMBED, generator=generator), f"prompt {index}")
        for index in range(count)
    ]


def write(folder: Path, rows: list[Sample] | None = None) -> Path:
    """Ten samples in three shards of four."""
    write_shards(folder, samples() if rows is None else rows, torch.zeros(EMBED), 4, {"kind": "random"})
    return folder


def tensor_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rewrite(shard: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Every member's bytes replaced by what `change` gives; None leaves the member out."""
    with tarfile.open(shard) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as archive:
        for name, data in members:
            new = change(name, data)
            if new is not None:
                info = tarfile.TarInfo(name)
                info.size = len(new)
                archive.addfile(info, io.BytesIO(new))


def replace_latent(data: Path, latent: bytes) -> None:
    rewrite(data / SHARD, lambda name, old: latent if name == f"{KEY}.latent.pt" else old)


def truncate(data: Path) -> None:
    """Within the third of four samples."""
    with tarfile.open(data / SHARD) as archive:
        end = archive.getmember(f"{KEY}.embed.pt").offset_data + 10
    with (data / SHARD).open("r+b") as file:
        file.truncate(end)


def spoil_header(data: Path) -> None:
    """tarfile takes it for the end of the archive."""
    with tarfile.open(data / SHARD) as archive:
        begin = archive.getmember(f"{KEY}.embed.pt").offset
    with (data / SHARD).open("r+b") as file:
        file.seek(begin)
        file.write(b"\x07" * 512)


def huge_view() -> bytes:
    """A few bytes that describe a terabyte."""
    return tensor_bytes(torch.zeros(1).expand(2**38))


GOOD = samples()[6].latent_CTHW
assert GOOD is not None
# {damage: (what does it, samples lost, words of the message)}
HEADER_DAMAGE: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "corrupt shard": (lambda data: (data / SHARD).write_bytes(b"\x07" * 4096), 4, (SHARD, "not a readable tar")),
    "no bytes": (lambda data: (data / SHARD).write_bytes(b""), 4, (SHARD, "not a readable tar")),
    "truncated tar": (truncate, 2, (SHARD, "truncated")),
    "damaged header": (spoil_header, 2, (SHARD, "damaged header")),
    "empty tar": (lambda data: tarfile.open(data / SHARD, "w").close(), 4, (SHARD, "holds no samples")),
    "lost shard": (lambda data: (data / SHARD).unlink(), 4, ("holds 6 samples", "says 10")),
    "missing part": (
        lambda data: rewrite(data / SHARD, lambda name, old: None if name == f"{KEY}.embed.pt" else old),
        1,
        (SHARD, KEY, "embed.pt"),
    ),
}
SAMPLE_DAMAGE: dict[str, tuple[Callable[[Path], bytes], tuple[str, ...]]] = {
    "wrong shape": (lambda mark: tensor_bytes(GOOD[..., :1].clone()), ("(4, 3, 2, 1)", "expected (4, 3, 2, 2)")),
    "huge view": (lambda mark: huge_view(), ("(274877906944,)", "expected")),
    "nan": (lambda mark: tensor_bytes(GOOD.clone().fill_(float("nan"))), ("NaN",)),
    "too large": (lambda mark: tensor_bytes(GOOD * 1e6), ("too large for float16",)),
    "pickle with code": (lambda mark: pickle.dumps(RunsCode(mark)), ("refused", "safetensors")),
    "torch file with code": (lambda mark: tensor_bytes(RunsCode(mark)), ("refused", "safetensors")),
    "not a tensor": (lambda mark: tensor_bytes([1, 2]), ("list",)),
    "garbage": (lambda mark: b"\x00" * 100, ("refused",)),
    "no bytes": (lambda mark: b"", ("truncated or not a torch file",)),
}
