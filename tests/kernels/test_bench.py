"""The benchmark's lines compute, its table survives a line that fails, and a red check gets no speed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from turbokernels import check
from turbokernels.timing import Call, measure

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import bench
from bench_rows import SHAPES, TARGETS, Row, Rows, Shape

TINY = Rows(Shape("tiny", length=130, heads=2, dim=32, hidden=96), torch.device("cpu"))


@pytest.mark.parametrize("row", [row for row in TINY.all() if row.op != "sdpa"], ids=lambda row: row.name)
def test_every_line_computes(row: Row) -> None:
    row.make()()
    if row.reference is not None:
        row.reference()()


def test_lines_refer_to_what_exists() -> None:
    names = [row.name for row in TINY.all()]
    assert len(set(names)) == len(names)
    for shape in SHAPES:
        assert set(TARGETS[shape]) <= set(names)
    for row in TINY.all():
        assert row.op in bench.OPS
        assert set(row.checks) <= set(check.CHECKS)
        assert row.beside is None or row.beside in names
        assert bool(row.flops) != bool(row.bytes)


def fake_measure(calls: Sequence[Call], seconds: float, graphed: bool) -> tuple[float, bool]:
    for call in calls:
        call()
    return 2.0, graphed


def fails() -> Call:
    raise torch.OutOfMemoryError("no room\nat all")


def test_failures_cost_their_own_line_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row("peer", "sdpa", lambda: lambda: None, flops=4e12),
        Row("broken", "sparse", fails, flops=1.0, target_ms=1.0),
        Row("wrong", "sparse", lambda: lambda: None, ("sparse_attention",), flops=1.0),
        Row("right", "sparse", lambda: lambda: None, ("select_blocks",), bytes=8e9, beside="peer", target_ms=3.0),
    ]
    results = {
        "sparse_attention": check.Result("sparse_attention", [check.Part("o", 0.5, 0.01)]),
        "select_blocks": check.Result("select_blocks", [check.Part("lists", 0.001, 0.02)]),
    }
    timings = bench.time_rows(rows, "tiny", results, 0.1, fake_measure)
    peer, broken, wrong, right = timings
    assert (peer.ms, peer.tflops, peer.tb_per_s) == (2.0, 2000.0, None)
    assert (broken.ms, broken.error) == (None, "OutOfMemoryError: no room")
    assert (wrong.ms, wrong.error) == (None, "no speed: the check of sparse_attention is red")
    assert (right.ms, right.tb_per_s, right.speedup, right.graphed) == (2.0, 4.0, 1.0, True)
    console = Console(record=True, width=160)
    console.print(bench.table_of(timings))
    text = console.export_text()
    assert "no room" in text
    assert "1.00x peer" in text
    assert "lists 1.0e-03, limit 2e-02" in text
    report = {"gpu": "G", "versions": {"torch": "2"}, "date": "2026-01-02T03", "rows": [asdict(x) for x in timings]}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(report))
    assert bench.main(["--show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "| tiny | right | 2.000 |  | 4.00 | 3 (met) |  | 1.00x peer | lists 1.0e-03, limit 2e-02 |" in shown
    assert "G, torch 2, 2026-01-02." in shown


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "no JSON", "{}", "[]"])
def test_what_is_no_result_is_not_shown(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    assert bench.main(["--show", str(path)]) == 1
    assert f"--show {path}: no result of this benchmark" in capsys.readouterr().err


def test_on_a_cpu_calls_take_the_wall_clock() -> None:
    done: list[str] = []

    def sleeps(name: str, seconds: float) -> Call:
        return lambda: (done.append(name), time.sleep(seconds))

    ms, graphed = measure([sleeps("a", 0.002), sleeps("b", 0.002)], 0.02, True, torch.device("cpu"))
    assert not graphed
    assert 2 <= ms < 200
    # One call each that does not count, two that tell how long they take, then about 20 ms of them, in turn.
    assert done[:4] == ["a", "b", "a", "b"]
    assert 7 <= len(done) <= 4 + 10
