"""The training benchmark takes the stages' own steps, from shards, and a case that fails costs its own rows."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import TINY, register

from turbotrain.codecs.vae import VideoCodec

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import bench_training


@pytest.fixture(autouse=True)
def _world(monkeypatch: pytest.MonkeyPatch) -> None:
    register()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a step built the VAE")

    monkeypatch.setattr(VideoCodec, "__init__", refuse)


def report(tmp_path: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    path = tmp_path / "bench.json"
    tiny = ["recipe=shapes", f"model.variant={TINY}", "attention=sla_small", "launch.device=cpu"]
    assert bench_training.main([*tiny, "--warmup", "0", "--json", str(path), *arguments]) == status
    return json.loads(path.read_text())


def test_every_kind_of_step_is_timed(tmp_path: Path) -> None:
    cases = ["sla", "dcm", "scm student=dense", "dmd"]
    flags = [flag for case in cases for flag in ("--case", case)]
    found = report(tmp_path, "--repeats", "2", *flags)
    rows = {row["kind"]: row for row in found["rows"]}
    assert list(rows) == ["sla", "dcm", "scm", "critic", "scm+dmd"]
    for row in rows.values():
        assert row["steps"] == len(row["loss"]) == 2
        assert 0 < row["min_s"] <= row["seconds"] <= row["max_s"]
        assert row["seconds"] == pytest.approx(row["teacher_s"] + row["student_s"], rel=0.5)
        assert row["tokens_per_s"] > 0
        assert all(math.isfinite(x) for x in (*row["loss"], *row["grad_norm"]))
    assert rows["critic"]["teacher_s"] == 0 < rows["scm"]["teacher_s"]
    assert found["tokens"] == 256
    assert "the VAE is never built" in found["what"]


def test_a_failure_costs_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = bench_training.build

    def no_room(kind: str, *rest: Any) -> Any:
        if kind == "dcm":
            raise torch.OutOfMemoryError("no room\nat all")
        return build(kind, *rest)

    monkeypatch.setattr(bench_training, "build", no_room)
    found = report(tmp_path, "--repeats", "1", "--case", "dcm", "--case", "sla", status=1)
    assert [row["error"] for row in found["rows"]] == ["OutOfMemoryError: no room at all", ""]


@pytest.mark.parametrize(("case", "message"), [("scm student=fast", "choose sla or dense"), ("scm rcm.steps=x", "rcm")])
def test_cases_that_cannot_be_say_so(case: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_training.main(["recipe=shapes", "--case", case]) == 2
    assert message in capsys.readouterr().out
