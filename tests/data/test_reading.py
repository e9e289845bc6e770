"""Reading shards: equal from memory and from files, by webdataset too, exact from any step on, one shape a batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import webdataset
from shard_damage import EMBED, LATENT, SAMPLE_DAMAGE, replace_latent, samples, write

from turbotrain.checkpoint.io import load_tensor
from turbotrain.config import Config
from turbotrain.data.latents import Batch, LatentDataset
from turbotrain.data.shards import DatasetError, Needs
from turbotrain.data.writing import Sample, ShardFile, write_index
from turbotrain.stages.context import BatchSource, StageContext
from turbotrain.stages.loading import BatchOrder

SHAPES = ((4, 3, 2, 2), (4, 3, 2, 4), (4, 1, 2, 2))


def source(
    dataset: LatentDataset, batch: int, processes: int = 1, rank: int = 0, config: Config | None = None
) -> BatchSource:
    accelerator = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
    context = StageContext("sla", config or Config(), Path("unused"), {}, cast(Any, accelerator))
    return BatchSource(context, dataset, batch)


def mixed(folder: Path) -> Path:
    """Shapes of 9, 5 and 2 samples, a shard each."""
    for number, (shape, count) in enumerate(zip(SHAPES, (9, 5, 2))):
        rows = samples(count, shape)
        with ShardFile(folder / f"shape{number}-000000.tar", tuple(rows[0].members())) as shard:
            for index, row in enumerate(rows):
                shard.write(f"{index:09d}", row.members())
            shard.finish()
    write_index(folder, torch.zeros(EMBED), {})
    return folder


def equal(a: Batch, b: Batch) -> bool:
    return (
        a.prompts == b.prompts and torch.equal(a.latent_BCTHW, b.latent_BCTHW) and torch.equal(a.embed_BLD, b.embed_BLD)
    )


def test_memory_and_stream_give_equal_batches(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    replace_latent(data, SAMPLE_DAMAGE["nan"][0](tmp_path))
    held, read = (LatentDataset(data, Needs(LATENT, max_bad=1), memory) for memory in (1e9, 0))
    assert (held.in_memory, read.in_memory) == (True, False)
    a, b = source(held, 4), source(read, 4)
    assert all(equal(a.at(step)[0][0], b.at(step)[0][0]) for step in range(6))
    assert b.reader.metrics["bad_samples"] == 1
    assert b.reader.metrics["data_mb_per_s"] > 0
    assert a.reader.metrics.keys() == {"data_wait", "bad_samples"}


def test_a_stream_goes_on_from_any_step_and_any_number_of_ranks(tmp_path: Path) -> None:
    data = write(tmp_path / "data")

    def stream() -> LatentDataset:
        return LatentDataset(data, Needs(LATENT), 0)

    whole = source(stream(), 4)
    seen = [whole.at(step)[0][0] for step in range(7)]
    resumed = source(stream(), 4)
    for step in (4, 5, 6, 1, 1):
        assert equal(resumed.at(step)[0][0], seen[step])
    ranks = [source(stream(), 4, 2, rank) for rank in range(2)]
    for step in (4, 5):
        parts = [rank.at(step)[0][0] for rank in ranks]
        assert [prompt for part in parts for prompt in part.prompts] == seen[step].prompts


def test_an_error_while_reading_ahead_comes_with_its_own_step(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    replace_latent(data, SAMPLE_DAMAGE["nan"][0](tmp_path))
    batches = source(LatentDataset(data, Needs(LATENT), 0), 1)
    drawn = BatchOrder(batches.seed, [list(range(10))], 1)
    bad = next(step for step in range(10) if drawn.at(step) == [6])
    for step in range(bad):
        batches.at(step)
    with pytest.raises(DatasetError, match="NaN"):
        batches.at(bad)


def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    shards = [str(shard) for shard in sorted(data.glob("*.tar"))]
    rows = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [row["__key__"] for row in rows] == [f"{index:09d}" for index in range(10)]
    for row, sample in zip(rows, samples(), strict=True):
        assert torch.equal(load_tensor(row["latent.pt"], "latent"), sample.latent_CTHW.half())  # type: ignore[union-attr]
        assert row["prompt.txt"].decode() == sample.prompt


def test_image_conditioning_comes_with_the_batch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        Sample(
            row.latent_CTHW, row.embed_LD, row.prompt, torch.randn(8, 3, 2, 2, generator=generator), torch.randn(7, 9)
        )
        for row in samples(5)
    ]
    dataset = LatentDataset(write(tmp_path / "data", rows), Needs(LATENT, ("latent.pt", "y.pt", "clip.pt")))
    batch = dataset.batch([3, 1])
    given = batch.conditioning.arguments
    assert given.keys() == {"y_BCTHW", "clip_BLD"}
    for row, index in enumerate((3, 1)):
        assert torch.equal(given["y_BCTHW"][row], rows[index].y_CTHW.half().float())  # type: ignore[union-attr]
        assert torch.equal(given["clip_BLD"][row], rows[index].clip_LD.half().float())  # type: ignore[union-attr]
    assert batch.loss_mask is None


def test_first_frames_are_given_as_often_as_said(tmp_path: Path) -> None:
    config = Config()
    config.data.first_frame = 0.25
    batches = source(LatentDataset(write(tmp_path / "data")), 400, config=config)
    batch, _ = batches.at(0)[0]
    clean_BT = batch.conditioning.clean_frames_BT
    assert clean_BT is not None
    assert not clean_BT[:, 1:].any()
    share = float(clean_BT[:, 0].double().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5
    assert torch.equal(batch.loss_mask.expand(400, 1, 3, 1, 1)[:, 0, :, 0, 0], ~clean_BT)  # type: ignore[union-attr]
    assert torch.equal(
        batch.conditioning.restore(torch.zeros_like(batch.latent_BCTHW))[clean_BT[:, 0], :, 0],
        batch.latent_BCTHW[clean_BT[:, 0], :, 0],
    )
    assert source(LatentDataset(tmp_path / "data"), 2).at(0)[0][0].loss_mask is None


# ---- several shapes -------------------------------------------------------------------------------------------------


def test_mixed_shapes_must_be_asked_for(tmp_path: Path) -> None:
    data = mixed(tmp_path)
    with pytest.raises(DatasetError, match=r"expected .*data\.mixed_shapes=true"):
        LatentDataset(data, Needs(SHAPES[0]))
    assert [len(bucket) for bucket in LatentDataset(data, Needs(SHAPES[0], mixed=True)).buckets] == [9, 5, 2]
    with pytest.raises(DatasetError, match=r"another resolution, length or VAE$"):
        LatentDataset(data, Needs((5, 3, 2, 2), mixed=True))


@pytest.mark.parametrize("memory", [0, 1e9])
def test_every_batch_has_one_shape(memory: float, tmp_path: Path) -> None:
    data = mixed(tmp_path)
    batches = source(LatentDataset(data, Needs(SHAPES[0], mixed=True), memory), 2)
    seen = Counter(batches.at(step)[0][0].latent_shape for step in range(80))
    # 9, 5 and 2 samples fill 4, 2 and 1 batches of two: a round of seven, of which 80 steps hold eleven and a part.
    assert all(11 * weight <= seen[shape] <= 12 * weight for shape, weight in zip(SHAPES, (4, 2, 1)))


def test_every_bucket_is_drawn_in_epochs() -> None:
    buckets = [list(range(9)), list(range(9, 14)), [14, 15]]
    order = BatchOrder(1, buckets, 2)
    steps = [order.at(step) for step in range(63)]
    for bucket in buckets:
        drawn = [index for step in steps for index in step if index in bucket]
        size = len(bucket)
        for epoch in range(len(drawn) // size):
            assert sorted(drawn[epoch * size : (epoch + 1) * size]) == bucket
    assert all(len({next(n for n, bucket in enumerate(buckets) if i in bucket) for i in step}) == 1 for step in steps)
    fresh = BatchOrder(1, buckets, 2)
    assert [fresh.at(step) for step in (40, 3, 62)] == [steps[step] for step in (40, 3, 62)]
    assert [BatchOrder(2, buckets, 2).at(step) for step in range(63)] != steps
