"""Writing shards: what was written before a kill is kept, a torn sample is not, and the bytes do not tell the difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shard_damage import EMBED, samples, write

from turbotrain.checkpoint.atomic import new_file
from turbotrain.data.build import RANGES, finish
from turbotrain.data.shards import DatasetError, check_shards
from turbotrain.data.writing import Sample, ShardFile, write_index, write_shards

ROWS = [row.members() for row in samples(4)]
PARTS = tuple(ROWS[0])


def write_rows(path: Path, count: int = 4, complete: bool = True) -> None:
    with ShardFile(path, PARTS) as shard:
        for index, members in enumerate(ROWS[:count]):
            if f"{index:09d}" not in shard.done:
                shard.write(f"{index:09d}", members)
        if complete:
            shard.finish()


def test_any_torn_end_is_cut_off(tmp_path: Path) -> None:
    write_rows(tmp_path / "whole.tar")
    whole = (tmp_path / "whole.tar").read_bytes()
    path = tmp_path / "killed.tar"
    write_rows(path, 3, complete=False)
    partial = path.with_name(".killed.tar.partial")
    ends = [0, *(partial.stat().st_size * n // 3 for n in (1, 2, 3))]
    for cut in [*range(0, ends[3], 700), *ends]:
        path.unlink(missing_ok=True)
        partial.write_bytes(whole[:cut])
        with ShardFile(path, PARTS) as shard:
            # A sample ends with its prompt of 8 bytes, which is padded to a block.
            assert len(shard.done) == sum(cut >= end - (512 - 8) for end in ends[1:]), cut
        write_rows(path)
        assert path.read_bytes() == whole, cut
    assert not partial.exists()


def test_nothing_bears_the_name_before_it_is_whole(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.tar", 2, complete=False)
    assert not (tmp_path / "a.tar").exists()
    assert list(tmp_path.glob("*.tar")) == []


def test_one_writer_a_shard(tmp_path: Path) -> None:
    with ShardFile(tmp_path / "a.tar", PARTS), pytest.raises(DatasetError, match=r"another process.*--worker"):
        ShardFile(tmp_path / "a.tar", PARTS)


def test_a_shard_without_samples_is_not_left_behind(tmp_path: Path) -> None:
    with ShardFile(tmp_path / "a.tar", PARTS) as shard:
        shard.finish()
    assert list(tmp_path.iterdir()) == []


def test_the_index_counts_and_refuses_damage(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    facts = write_index(data, torch.zeros(EMBED), {"kind": "again"})
    assert facts["count"] == 10
    assert facts["latent_shape"] == [4, 3, 2, 2]
    assert set(facts["parts"]) == {"latent.pt", "embed.pt", "prompt.txt"}
    assert {name: shard["count"] for name, shard in facts["shards"].items()} == {
        "train-000000.tar": 4,
        "train-000001.tar": 4,
        "train-000002.tar": 2,
    }
    assert check_shards(data).facts["kind"] == "again"
    with (data / "train-000001.tar").open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(DatasetError, match=r"train-000001\.tar is truncated"):
        write_index(data, torch.zeros(EMBED), {})


def test_a_marker_that_another_worker_is_writing_is_none_yet(tmp_path: Path) -> None:
    """Or was writing when it was killed: the index of the finished ranges is made all the same."""
    write_shards(tmp_path / "data", [Sample(None, torch.ones(2, 4), "a")], torch.zeros(2, 4), 4, {})
    with new_file(tmp_path / "data" / RANGES / "000001.json") as new:
        new.write_text("{")
        assert finish(tmp_path / "data", torch.zeros(2, 4))["count"] == 1
        new.write_text('{"samples": 1, "skipped": {}}')
