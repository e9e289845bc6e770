"""Where a matrix keeps what: one folder, every file whole or not at all, so that whatever was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbotrain.compose import UsageError
from turbotrain.evidence.matrix import TEACHER, Cell, Matrix, Row
from turbotrain.records import status, write_json


@dataclass(frozen=True)
class Folders:
    """base/: the shared stages. cells/NAME/: a cell's run. results/NAME/ROW.json: one measured row. reference/: the teacher's
    latents and the rendered clips' features, which every row is compared with."""

    root: Path
    matrix: Matrix

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def reference_latents(self) -> Path:
        return self.root / "reference" / "latents.safetensors"

    @property
    def real_features(self) -> Path:
        return self.root / "reference" / "real.safetensors"

    def given(self) -> dict[str, str]:
        """Checkpoints that take the place of base stages: {"teacher": path, "codec": path}."""
        return read_json(self.root / "given.json")

    def overrides(self) -> list[str]:
        """What the command line said of every training."""
        return read_json(self.root / "overrides.json").get("overrides", [])

    @property
    def codec(self) -> Path:
        return self._base_or_given("codec")

    def _base_or_given(self, stage: str) -> Path:
        """Raises UsageError where neither the base nor the command line brings it."""
        if (given := self.given().get(stage)) is not None:
            return Path(given)
        if stage not in self.matrix.base:
            raise UsageError(
                f"--{stage}: missing; {self.matrix.name} does not train one (base: {', '.join(self.matrix.base)})"
            )
        return self.base / stage / "checkpoint"

    def checkpoint(self, cell: Cell) -> Path:
        """The network of a cell; of `merge` none is kept."""
        if cell.stage:
            return self.root / "cells" / cell.name / cell.stage / "checkpoint"
        if cell.network == TEACHER:
            return self._base_or_given(TEACHER)
        return self.checkpoint(self.matrix.cell(cell.network))

    def checkpoints(self) -> dict[str, Path]:
        return {cell.name: self.checkpoint(cell) for cell in self.matrix.cells if cell.network != "merge"}

    def trained(self, cell: Cell) -> bool:
        return not cell.stage or status(self.root / "cells" / cell.name / cell.stage) == "done"

    def result(self, cell: Cell, row: Row) -> Path:
        return self.root / "results" / cell.name / f"{row.name}.json"

    def declare(self, overrides: Sequence[str]) -> None:
        """Note what trainings and rows come of, beside what is there. overrides: of every training.

        Raises:
            UsageError: something that is there came of other settings. It would be shown as if it had come of these.
        """
        path, matrix = self.root / "declared.json", self.matrix
        now: dict[str, dict[str, Any]] = {
            "matrix": {
                **{name: getattr(matrix, name) for name in ("recipe", "base", "common", "prompts", "seeds", "real")},
                "overrides": [said for said in overrides if not said.startswith("logging.")],
                "given": self.given(),
            }
        }
        made = {"matrix": any((self.root / name).exists() for name in ("base", "cells", "results"))}
        for cell in matrix.cells:
            where = f"cells.{cell.name}"
            now[where] = {name: getattr(cell, name) for name in ("stage", "train", "network", "merge_sla", "merge_rcm")}
            made[where] = any((self.root / name / cell.name).exists() for name in ("cells", "results"))
            for row in cell.rows:
                now[f"{where}.rows.{row.name}"] = {**asdict(row), "label": ""}
                made[f"{where}.rows.{row.name}"] = self.result(cell, row).is_file()
        now = json.loads(json.dumps(now))
        before = read_json(path)
        for where, values in now.items():
            earlier = before.get(where, {})
            changed = [name for name, value in earlier.items() if values.get(name, value) != value]
            if changed and made[where]:
                name = changed[0]
                raise UsageError(
                    f"{where}.{name}={values[name]!r}: what lies in {self.root} came of {earlier[name]!r}; give another "
                    "--output, or remove what came of it (in cells/ and results/)"
                )
        write_json(path, {**before, **now})

    def missing(self, cell: Cell) -> list[Row]:
        """Rows that are still to be measured."""
        return [row for row in cell.rows if not self.result(cell, row).is_file()]


def read_json(path: Path) -> dict[str, Any]:
    """A file's contents; {} where there is none. Raises ValueError where it is damaged."""
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object")
    return value
