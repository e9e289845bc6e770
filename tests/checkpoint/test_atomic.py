"""What is being written: invisible to who looks for finished files, told with a remedy when it fails, cleared after a kill."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from turbotrain.checkpoint.atomic import UNFINISHED, clear_unfinished, new_file, new_folder

LONGEST = f"{'a' * 250}.json"


@pytest.mark.parametrize("name", ["a.json", LONGEST])
def test_nobody_who_looks_by_suffix_finds_half_a_file(name: str, tmp_path: Path) -> None:
    with new_file(tmp_path / name) as new:
        new.write_text("{")
        assert [path.name.startswith(UNFINISHED) for path in tmp_path.iterdir()] == [True]
        assert not list(tmp_path.glob("*.json"))
    assert [path.name for path in tmp_path.glob("*.json")] == [name]


@pytest.mark.parametrize(
    "error",
    [SafetensorError("IO error: No space left"), OSError(errno.ENOSPC, "No space left"), OSError("No space left")],
)
def test_every_failure_names_place_reason_and_remedy(error: Exception, tmp_path: Path) -> None:
    said = rf"cannot write {tmp_path}/out: .*No space left; choose another output, or free space .*nothing was changed"
    for writing in (new_file(tmp_path / "out"), new_folder(tmp_path / "out")):
        with pytest.raises(OSError, match=said), writing:
            raise error
    # Of a file in a folder the folder is named, and the reason once.
    with pytest.raises(OSError, match=said) as raised, new_folder(tmp_path / "out") as folder, new_file(folder / "a"):
        raise error
    assert str(raised.value).count("cannot write") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    said = r"cannot write .*/out: No such file or directory \(.*/absent\)"
    with pytest.raises(OSError, match=said), new_file(tmp_path / "out"):
        (tmp_path / "absent").read_bytes()


def test_what_kills_left_is_cleared(tmp_path: Path) -> None:
    deep = tmp_path / "checkpoint" / f"{UNFINISHED}high.x"
    deep.mkdir(parents=True)
    for torn in (deep / "model.safetensors", deep / f"{UNFINISHED}config.json.y", tmp_path / f"{UNFINISHED}a.json.z"):
        torn.write_text("{")
    (tmp_path / "checkpoint" / "kept").touch()
    clear_unfinished(tmp_path)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["checkpoint", "kept"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_file(tmp_path / "a") as new:
            new.touch()
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
