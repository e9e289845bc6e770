"""All results of a matrix in one JSON document: what the page is rendered from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbotrain.compose import UsageError
from turbotrain.evaluation.video import write_bytes
from turbotrain.evidence.folders import Folders, read_json
from turbotrain.records import read_record

TIMES = ("seconds", "peak_memory_bytes")


def collect(folders: Folders) -> dict[str, Any]:
    """{"name", "recipe", "common", "overrides", "prompts", "seeds", "real", "planned_rows", "environment", "base": {stage:
    facts}, "training": {cell: facts}, "rows": [...]}; rows in the order of the matrix, those that are missing left out."""
    matrix = folders.matrix
    rows = [read_json(path) for cell, row in matrix.rows if (path := folders.result(cell, row)).is_file()]
    environments = [row.pop("environment") for row in rows]
    base = {stage: _facts(folders.base / stage) for stage in matrix.base}
    training = {
        cell.name: _facts(folders.root / "cells" / cell.name / cell.stage) for cell in matrix.cells if cell.stage
    }
    return {
        "name": matrix.name,
        "recipe": matrix.recipe,
        "common": list(matrix.common),
        "overrides": folders.overrides(),
        "prompts": matrix.prompts,
        "seeds": matrix.seeds,
        "real": matrix.real,
        "planned_rows": len(matrix.rows),
        "environment": _together(environments),
        "base": {name: facts for name, facts in base.items() if facts},
        "training": {name: facts for name, facts in training.items() if facts},
        "rows": rows,
    }


def _together(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all rows were measured on; of what is not the same for all, every value, with commas between."""
    found: dict[str, list[Any]] = {}
    for environment in environments:
        for name, value in environment.items():
            if value not in (values := found.setdefault(name, [])):
                values.append(value)
    return {name: values[0] if len(values) == 1 else ", ".join(map(str, values)) for name, values in found.items()}


def check_keeps(path: Path, folders: Folders) -> None:
    """Before hours of work end in writing fewer rows than are there: a fresh run begins with none.

    Raises:
        UsageError: `path` holds rows that these folders have not, or is no results at all.
    """
    if not path.is_file():
        return
    try:
        there = [(row["cell"], row["row"]) for row in json.loads(path.read_text())["rows"]]
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"--json {path}: is there and holds no results of a matrix; name another file") from error
    measured = {(cell.name, row.name) for cell, row in folders.matrix.rows if folders.result(cell, row).is_file()}
    lost = [name for name in there if name not in measured]
    if lost:
        raise UsageError(
            f"--json {path}: holds {len(lost)} rows, {'/'.join(lost[0])} first, that are not in {folders.root} and would be "
            "lost; name another file"
        )


def write_results(path: Path, document: dict[str, Any]) -> None:
    """A row a line: one that changes is one line of a difference, and a table of 77 is no hundred thousand lines long."""
    head = json.dumps({name: value for name, value in document.items() if name != "rows"}, indent=2).removesuffix("\n}")
    rows = ",\n".join(f"    {json.dumps(row)}" for row in document["rows"])
    write_bytes(path, f'{head},\n  "rows": [\n{rows}\n  ]\n}}\n'.encode())


def _facts(folder: Path) -> dict[str, Any]:
    """What a finished stage says of itself; {} where there is none."""
    record = read_record(folder)
    if not record or record.get("status") != "done":
        return {}
    shown = {name: record[name] for name in TIMES if name in record}
    environment = record.get("environment") or {}
    return {**shown, "results": record.get("results"), "commit": environment.get("commit")}
