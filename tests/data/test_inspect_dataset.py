"""tools/inspect_dataset.py: figures that are right, damage that is told, a sheet that shows the clips."""

from __future__ import annotations

import json
from pathlib import Path

import inspect_dataset as tool
import numpy as np
import pytest
import torch
from PIL import Image
from shard_damage import HEADER_DAMAGE, SAMPLE_DAMAGE, replace_latent, samples, write
from tiny_wan import CHANNELS

from turbotrain.codecs import VideoCodec
from turbotrain.data.writing import Sample, write_shards
from turbotrain.evaluation.video import contact_sheet


def test_counts_and_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data")
    assert tool.main([str(data), "--json", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    assert "10 samples in 3 shards" in printed
    assert "prompts: 10 distinct of 10 looked at, tokens 5 to 5, mean 5.0" in printed
    (bucket,) = json.loads((tmp_path / "report.json").read_text())["buckets"]
    numbers = torch.stack([row.latent_CTHW.half().double() for row in samples()]).transpose(0, 1).flatten(1)  # type: ignore[union-attr]
    torch.testing.assert_close(torch.tensor(bucket["mean"], dtype=torch.float64), numbers.mean(1))
    torch.testing.assert_close(torch.tensor(bucket["std"], dtype=torch.float64), numbers.std(1, correction=0))
    assert (bucket["min"], bucket["max"]) == (float(numbers.min()), float(numbers.max()))


def test_a_few_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(write(tmp_path / "data")), "--samples", "4"]) == 0
    assert "4 distinct of 4 looked at" in capsys.readouterr().out


def test_damage_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data")
    replace_latent(data, SAMPLE_DAMAGE["nan"][0](tmp_path))
    (data / "train-000000.tar").write_bytes(b"\x07" * 4096)
    assert tool.main([str(data)]) == 1
    printed = capsys.readouterr().out
    assert "5 samples in 2 shards" in printed
    assert "lost: 5 samples" in printed
    assert "damaged: " in printed
    assert "NaN" in printed
    assert HEADER_DAMAGE["corrupt shard"][2][1] in printed
    assert tool.main([str(tmp_path / "nowhere")]) == 1
    assert "no *.tar shards" in capsys.readouterr().err


def test_the_sheet_shows_the_clips(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [Sample(torch.randn(CHANNELS, 2, 2, 3, generator=generator), torch.zeros(1, 1), f"p{n}") for n in range(3)]
    write_shards(tmp_path / "data", rows, torch.zeros(1, 1), 2, {})
    vae = str(models["t2v"] / "vae")
    sheet = ["--vae", vae, "--sheet", str(tmp_path / "a.png"), "--rows", "2", "--device", "cpu"]
    assert tool.main([str(tmp_path / "data"), *sheet]) == 0
    assert f"written: {tmp_path / 'a.png'}" in capsys.readouterr().out
    codec = VideoCodec.from_pretrained(vae)
    clips = [codec.decode(row.latent_CTHW.half().float()[None])[0].numpy() for row in rows[:2]]  # type: ignore[union-attr]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), contact_sheet(clips))


def test_a_sheet_needs_a_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path), "--sheet", "a.png"])
    assert "--sheet and --vae belong together" in capsys.readouterr().err
