"""Bad shards and samples: refused by default, counted and skipped up to the limit that is set, never run."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import torch
from shard_damage import EMBED, HEADER_DAMAGE, KEY, LATENT, SAMPLE_DAMAGE, SHARD, replace_latent, samples, write

from turbotrain.checkpoint.header import CheckpointProblem
from turbotrain.checkpoint.io import load_tensor
from turbotrain.data.latents import LatentDataset
from turbotrain.data.shards import INDEX_FILE, DatasetError, Needs, check_shards

MODES = {"memory": float("inf"), "stream": 0.0}


def read_all(folder: Path, needs: Needs, memory: float) -> LatentDataset:
    dataset = LatentDataset(folder, needs, memory)
    for index in range(len(dataset)):
        dataset.batch([index])
    return dataset


@pytest.mark.parametrize("damage", HEADER_DAMAGE)
def test_damaged_shards(damage: str, tmp_path: Path) -> None:
    spoil, lost, words = HEADER_DAMAGE[damage]
    data = write(tmp_path / "data")
    spoil(data)
    for limit in (0, lost - 1):
        with pytest.raises(DatasetError) as refused:
            check_shards(data, Needs(LATENT, max_bad=limit))
        for word in words:
            assert word in str(refused.value)
        assert limit == 0 or f"{lost} samples are lost in all, data.max_bad_samples={limit}" in str(refused.value)
    dataset = LatentDataset(data, Needs(LATENT, max_bad=lost))
    assert (len(dataset), dataset.bad_samples) == (10 - lost, lost)
    good = [f"prompt {i}" for i in range(10) if not (4 <= i < 8)]
    assert set(good) <= {dataset.prompt(index) for index in range(len(dataset))}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damage", SAMPLE_DAMAGE)
def test_damaged_samples(damage: str, mode: str, tmp_path: Path) -> None:
    make, words = SAMPLE_DAMAGE[damage]
    data, mark = write(tmp_path / "data"), tmp_path / "mark"
    replace_latent(data, make(mark))
    with pytest.raises(DatasetError) as refused:
        read_all(data, Needs(LATENT), MODES[mode])
    for word in (SHARD, KEY, *words):
        assert word in str(refused.value)
    dataset = read_all(data, Needs(LATENT, max_bad=1), MODES[mode])
    assert dataset.bad_samples == 1
    assert dataset.prompt(6) == "prompt 7", "the next good sample stands in"
    assert [dataset.prompt(i) for i in (5, 7)] == ["prompt 5", "prompt 7"]
    assert not mark.exists(), "code was run"


def test_a_prompt_that_is_no_text(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    with (data / SHARD).open("r+b") as file:
        entry = check_shards(data).entries[6]
        file.seek(entry.parts["prompt.txt"][0])
        file.write(b"\xff\xfe")
    with pytest.raises(DatasetError, match=rf"{KEY}: the prompt is not UTF-8 text; build or copy"):
        LatentDataset(data)


@pytest.mark.parametrize("mode", MODES)
def test_the_limit_counts_all_that_is_lost(mode: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    (data / "train-000002.tar").unlink()  # two samples
    replace_latent(data, SAMPLE_DAMAGE["nan"][0](tmp_path))
    assert read_all(data, Needs(LATENT, max_bad=3), MODES[mode]).bad_samples == 3
    with pytest.raises(DatasetError, match=r"3 samples are lost in all, data\.max_bad_samples=2"):
        read_all(data, Needs(LATENT, max_bad=2), MODES[mode])


def test_no_good_sample_is_left(tmp_path: Path) -> None:
    rows = samples(2)
    for row in rows:
        row.latent_CTHW.fill_(float("inf"))  # type: ignore[union-attr]
    dataset = LatentDataset(write(tmp_path / "data", rows), Needs(LATENT, max_bad=5), 0)
    with pytest.raises(DatasetError, match="no good sample of this shape"):
        dataset.batch([0])


def test_what_the_limit_does_not_cover(tmp_path: Path) -> None:
    lenient = Needs(LATENT, max_bad=100)
    data = write(tmp_path / "data")
    with pytest.raises(DatasetError, match=r"shape \(4, 3, 2, 2\), expected \(4, 3, 2, 4\).*another resolution"):
        check_shards(data, Needs((4, 3, 2, 4), max_bad=100))
    with pytest.raises(DatasetError, match=r"holds no y\.pt, clip\.pt, which an image-to-video network reads"):
        check_shards(data, Needs(LATENT, ("latent.pt", "y.pt", "clip.pt"), max_bad=100))
    (data / INDEX_FILE).write_bytes(b"torn")
    with pytest.raises(DatasetError, match="cannot be read"):
        check_shards(data, lenient)
    for shard in data.glob("*.tar"):
        shard.unlink()
    with pytest.raises(DatasetError, match=r"no \*\.tar shards"):
        check_shards(data, lenient)


def test_prompts_only_serve_what_starts_from_noise(tmp_path: Path) -> None:
    rows = [type(row)(None, row.embed_LD, row.prompt) for row in samples(3)]
    data = write(tmp_path / "data", rows)
    with pytest.raises(DatasetError, match=r"prompts only.*rcm alone"):
        check_shards(data, Needs(LATENT, ("latent.pt",)))
    batch = LatentDataset(data, Needs(LATENT)).batch([0, 2])
    assert batch.latent_shape == LATENT
    assert batch.embed_BLD.shape == (2, *EMBED)
    with pytest.raises(DatasetError, match="prompts only"):
        _ = batch.latent_BCTHW


def test_random_damage_is_always_told_as_such() -> None:
    """Whatever bytes a `.pt` holds, the reader says it in the one error that is counted."""
    good = samples(1)[0].members()["latent.pt"]
    draw = random.Random(0)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(draw.choice((1, 4, 64))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        length = draw.choice((len(data), draw.randrange(len(data))))
        with contextlib.suppress(CheckpointProblem):
            assert isinstance(load_tensor(bytes(data[:length]), "x"), torch.Tensor)
