"""What the stages left in a run folder (architecture contract 2), as data for the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class StageData:
    """One stage's folder: `record` is stage.json, `metrics` the lines of metrics.jsonl, `size` the bytes of its weights."""

    name: str
    record: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0


@dataclass
class RunData:
    """Everything a report shows.

    Attributes:
        evaluation: evaluate/report.json, or empty. clips: files of kept videos by row key, in the order of the prompts.
        quantization: the report of the quantize stage, or empty.
    """

    name: str
    variant: str
    stages: list[StageData]
    evaluation: dict[str, Any]
    clips: dict[str, list[Path]]
    quantization: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self.evaluation.get("rows", []))

    def stage(self, name: str) -> StageData | None:
        return next((stage for stage in self.stages if stage.name == name), None)


def read_run(run_folder: str | Path) -> RunData:
    """The files of a run folder (architecture contract 2) as data. Raises ValueError where there is no run."""
    folder = Path(run_folder)
    stages = [_read_stage(path.parent) for path in folder.glob("*/stage.json") if ".stale-" not in path.parent.name]
    evaluation = _read_json(folder / "evaluate" / "report.json")
    if not stages and not evaluation:
        raise ValueError(f"{folder}: no stage.json below it; name the folder of a run, such as outputs/shapes")
    stages.sort(key=lambda stage: str(stage.record.get("started", "")))
    files = (evaluation.get("clips") or {}).get("files", {})
    clips = {key: [folder / "evaluate" / name for name in names] for key, names in files.items()}
    quantization = _read_json(folder / "quantize" / "report.json")
    return RunData(folder.resolve().name, _variant(stages, folder), stages, evaluation, clips, quantization)


def _read_stage(folder: Path) -> StageData:
    weights = folder / "checkpoint"
    size = sum(file.stat().st_size for file in weights.rglob("model*.safetensors")) if weights.is_dir() else 0
    return StageData(folder.name, _read_json(folder / "stage.json"), _read_lines(folder / "metrics.jsonl"), size)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed while it wrote
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _variant(stages: Sequence[StageData], folder: Path) -> str:
    for stage in stages:
        name = (stage.record.get("fingerprint") or {}).get("model.variant")
        if name:
            return str(name)
    return folder.resolve().name
