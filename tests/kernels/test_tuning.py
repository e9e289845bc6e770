"""Where launch parameters come from: table, cache, search, first candidate; and what happens when they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton.testing
from triton.runtime.errors import OutOfResources
from turbokernels import tuning
from turbokernels.tuning import Launch, best

GPU = torch.device("cuda", 0)
KEY = (128, torch.bfloat16, 64)
SMALL, MIDDLE, LARGE = (Launch(4, stages, BLOCK_Q=64, BLOCK_K=64) for stages in (2, 3, 4))
CANDIDATES = (LARGE, MIDDLE, SMALL)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU called "Test 9000", whose tables and cache are in this test's folder, and which cannot hold LARGE."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test 9000")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "shared_memory", lambda device: 1000)
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(tuning.AUTOTUNE_VARIABLE, raising=False)
    tuning._read.cache_clear()
    launched.clear()

    def do_bench(function: Callable[[], object], **_: object) -> float:
        function()
        return {SMALL: 2.0, MIDDLE: 1.0}[launched[-1]]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)


launched: list[Launch] = []


def run(launch: Launch) -> None:
    launched.append(launch)
    if launch == LARGE:
        raise OutOfResources(2000, 1000, "shared memory")


def write_table(path: Path, launch: Launch) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"gpu": "Test 9000", "entries": {"op": {"128,bfloat16,64": launch.to_json()}}}))


def test_launch_is_a_value() -> None:
    launch = Launch(8, 3, BLOCK_Q=128, BLOCK_K=64)
    assert launch == Launch(8, 3, BLOCK_K=64, BLOCK_Q=128)
    assert hash(launch) == hash(Launch(8, 3, BLOCK_K=64, BLOCK_Q=128))
    assert launch.kwargs() == {"num_warps": 8, "num_stages": 3, "BLOCK_Q": 128, "BLOCK_K": 64}
    assert launch["BLOCK_Q"] == 128
    assert Launch.from_json(json.loads(json.dumps(launch.to_json()))) == launch


def test_the_first_candidate_without_table_or_search() -> None:
    assert best("op", KEY, (MIDDLE, LARGE), run, GPU) == MIDDLE
    assert best("op", KEY, (MIDDLE, LARGE), run, GPU) == MIDDLE
    assert launched == [MIDDLE]  # tried once, then remembered


def test_the_interpreter_takes_the_first_candidate_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best("op", KEY, CANDIDATES, run, torch.device("cpu")) == LARGE
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert best("op", KEY, CANDIDATES, run, GPU) == LARGE
    assert launched == []


def test_what_does_not_fit_is_an_error_with_a_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"op \(128,bfloat16,64\).*does not fit Test 9000.*TURBOKERNELS_AUTOTUNE=1"):
        best("op", KEY, CANDIDATES, run, GPU)


def test_a_search_skips_what_does_not_fit_and_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "1")
    assert best("op", KEY, CANDIDATES, run, GPU) == MIDDLE
    assert set(launched) == set(CANDIDATES)
    with pytest.raises(RuntimeError, match=r"none of 1 .*1000 bytes.*impl='reference'"):
        best("other", KEY, (LARGE,), run, GPU)
    # Another process, which may not search, and another op's entry beside it.
    best("third", KEY, (SMALL,), run, GPU)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.delenv(tuning.AUTOTUNE_VARIABLE)
    assert best("op", KEY, CANDIDATES, run, GPU) == MIDDLE
    assert list((tmp_path / "cache").rglob("*.tmp")) == []
    # The cache is in the format of the tables.
    assert set(json.loads(tuning.cache_file("Test 9000").read_text())["entries"]) == {"op", "third"}


def test_a_gpu_that_wakes_up_slowly_misleads_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed first takes five times as long."""
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "1")
    times: list[float] = []

    def do_bench(function: Callable[[], object], **_: object) -> float:
        function()
        times.append({SMALL: 2.0, MIDDLE: 1.0}[launched[-1]] * (1.0 if times else 5.0))
        return times[-1]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    assert best("op", KEY, (MIDDLE, SMALL), run, GPU) == MIDDLE
    assert times[0] == 5.0


def test_the_shipped_table_comes_before_the_cache(tmp_path: Path) -> None:
    write_table(tuning.cache_file("Test 9000"), MIDDLE)
    assert best("op", KEY, CANDIDATES, run, GPU) == MIDDLE
    write_table(tmp_path / "tables" / "test_9000.json", SMALL)
    tuning._read.cache_clear()
    tuning._chosen.clear()
    assert best("op", KEY, CANDIDATES, run, GPU) == SMALL


@pytest.mark.parametrize("text", ["", "[]", '{"entries": {"op": {"128,bfloat16,64": {"num_warps": 4}}}}'])
def test_a_damaged_or_outdated_cache_is_said_and_ignored(text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tuning.cache_file("Test 9000")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert best("op", KEY, (MIDDLE,), run, GPU) == MIDDLE
    assert str(path) in caplog.text


def test_an_entry_that_is_no_candidate_any_more_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    write_table(tuning.cache_file("Test 9000"), SMALL)
    assert best("op", KEY, (MIDDLE,), run, GPU) == MIDDLE
    assert "not a candidate any more" in caplog.text


def test_a_traced_graph_neither_searches_nor_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best("op", KEY, CANDIDATES, run, GPU) == LARGE
    assert launched == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert best("op", KEY, CANDIDATES, run, GPU) == MIDDLE


def test_small_operands_may_be_kept_from_deciding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "1")
    with tuning.without_search():
        assert best("op", KEY, CANDIDATES, run, GPU) == LARGE
    assert launched == []
    assert best("op", KEY, CANDIDATES, run, GPU) == MIDDLE


def test_too_many_candidates() -> None:
    with pytest.raises(ValueError, match="9 launch candidates"):
        best("op", KEY, [SMALL] * 9, run, GPU)


def test_shipped_tables_are_readable() -> None:
    tables = list((Path(tuning.__file__).parent / "tables").glob("*.json"))
    assert tables
    for path in tables:
        table = json.loads(path.read_text())
        assert tuning.table_name(table["gpu"]) == path.name
        for entries in table["entries"].values():
            for entry in entries.values():
                assert Launch.from_json(entry).to_json() == entry
