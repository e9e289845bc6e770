"""The matrix of runs as data (configs/evidence/*.yaml): which networks are trained, which rows are measured of each.

A cell is one network: trained by stages of a recipe, or another cell's, or the teacher. Its rows are ways to run it. Cells stand
in the order of their importance: where time ends early, what came first is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from turbotrain.compose import UsageError
from turbotrain.config_checks import SCHEMES
from turbotrain.model.attention_config import LAYER_TOPKS, AttentionConfig

TEACHER = "teacher"
SAMPLERS = ("teacher", "turbo")
QUANTIZE = ("scheme", "smooth", "weights_only", "target_error", "finetune")
# Fields whose YAML value is taken as it is, by annotation: which types it may have.
_SCALARS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "dict[str, Any]": (dict,),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_REFERENCE = re.compile(r"<([A-Za-z0-9_.-]+)>")  # another cell's checkpoint inside an override


@dataclass(frozen=True)
class Row:
    """One way to run a cell's network.

    Attributes:
        label: what tables call it; empty: the cell's title.
        attention: fields of `AttentionConfig` that replace the network's own. layer_budget: mean top-k that is shared out
            over the layers by the attention mass that they keep.
        quantize: {scheme, smooth, weights_only, target_error, finetune}: quantised as calibration does, or only its weights; as
            many linears stay in float as a target of relative latent error takes; fine-tuned for so many steps.
        mass: measure the attention mass kept, and note it. settings: more for `TurboPipeline.sample`.
    """

    name: str
    steps: int
    sampler: str = "turbo"
    label: str = ""
    attention: dict[str, Any] = field(default_factory=dict)
    layer_budget: float = 0.0
    mass: bool = False
    quantize: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def evaluations(self) -> int:
        """Passes through the network: guided sampling takes two a step."""
        guided = self.sampler == TEACHER and self.settings.get("guidance") != 1
        return self.steps * (2 if guided else 1)


@dataclass(frozen=True)
class Cell:
    """One network and its rows.

    Attributes:
        stage: sla | rcm, which trains it with `train` (overrides of the recipe); empty: nothing is trained.
        network: whose network it is where nothing is trained: `teacher`, a cell's name, or `merge`, which adds what the cell
            `merge_sla` learnt to the cell `merge_rcm`.
        group: section of the page.
    """

    name: str
    title: str
    group: str
    rows: tuple[Row, ...]
    stage: str = ""
    train: tuple[str, ...] = ()
    network: str = ""
    merge_sla: str = ""
    merge_rcm: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Cells whose networks must be there first."""
        named = [match for override in self.train for match in _REFERENCE.findall(override)]
        named += [name for name in (self.network, self.merge_sla, self.merge_rcm) if name not in ("", TEACHER, "merge")]
        return tuple(dict.fromkeys(named))

    def overrides(self, checkpoints: Mapping[str, Path]) -> list[str]:
        """`train` with every `<cell>` replaced by that cell's checkpoint."""
        return [_REFERENCE.sub(lambda match: str(checkpoints[match[1]]), override) for override in self.train]


@dataclass(frozen=True)
class Matrix:
    """What one file declares.

    Attributes:
        base: stages of the recipe that all cells share. common: overrides of every training.
        prompts, seeds: held-out prompts, and how often each is sampled. real: rendered clips for the Frechet distance.
    """

    name: str
    recipe: str
    base: tuple[str, ...]
    common: tuple[str, ...]
    prompts: int
    seeds: int
    real: int
    batch_size: int
    cells: tuple[Cell, ...]

    @property
    def rows(self) -> list[tuple[Cell, Row]]:
        return [(cell, row) for cell in self.cells for row in cell.rows]

    def cell(self, name: str) -> Cell:
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise UsageError(
            f"cell {name!r}: {self.name} has none of that name; it has {', '.join(c.name for c in self.cells)}"
        )


def load_matrix(path: Path) -> Matrix:
    """Read and check a matrix.

    Raises:
        UsageError: names the field, its value and what is allowed.
    """
    from omegaconf import OmegaConf

    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected a mapping with cells")
    values = {str(key): value for key, value in raw.items()}
    cells = tuple(_cell(str(name), value) for name, value in _mapping("cells", values.pop("cells", None)).items())
    for name in ("base", "common"):
        values[name] = _strings(name, values.get(name))
    matrix = _made(Matrix, f"{path.name}", {"name": path.stem, **values, "cells": cells})
    _check(matrix)
    return matrix


def _cell(name: str, value: Any) -> Cell:
    where = f"cells.{name}"
    value = dict(_mapping(where, value))
    rows = _mapping(f"{where}.rows", value.pop("rows", None))
    made = tuple(
        _made(Row, f"{where}.rows.{key}", {"name": str(key), **_mapping(f"{where}.rows.{key}", row)})
        for key, row in rows.items()
        if row is not None
    )
    value["train"] = _strings(f"{where}.train", value.get("train"))
    return _made(Cell, where, {"name": name, "title": name, **value, "rows": made})


def _mapping(where: str, value: Any) -> dict[Any, Any]:
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{where}={value!r}: expected a mapping")
    return value or {}


def _strings(where: str, value: Any) -> tuple[str, ...]:
    """A string alone would become its letters."""
    if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise UsageError(f"{where}={value!r}: expected a list of strings")
    return tuple(value or ())


def _made(kind: type, where: str, values: dict[str, Any]) -> Any:
    known = {one.name for one in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"{where}: has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
    for one in fields(kind):
        allowed = _SCALARS.get(str(one.type))
        if allowed and one.name in values:
            _check_type(f"{where}.{one.name}", values[one.name], allowed)
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{where}: {error}") from error


def _check_type(where: str, value: Any, allowed: tuple[type, ...]) -> None:
    """A bool is no number."""
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise UsageError(f"{where}={value!r}: expected {allowed[-1].__name__}")


def _check(matrix: Matrix) -> None:
    if not matrix.cells:
        raise UsageError(f"{matrix.name}: cells: at least one is needed")
    for name in ("prompts", "seeds", "real", "batch_size"):
        least = 2 if name in ("prompts", "real") else 1
        if getattr(matrix, name) < least:
            raise UsageError(f"{matrix.name}: {name}={getattr(matrix, name)}: must be at least {least}")
    first = matrix.cells[0]
    if first.network != TEACHER or not first.rows or first.rows[0].sampler != TEACHER:
        raise UsageError(
            f"{matrix.name}: the first cell must be the teacher's and its first row the reference: network: teacher, with "
            "a row of sampler: teacher"
        )
    seen: set[str] = set()
    for cell in matrix.cells:
        _check_cell(cell, seen)
        seen.add(cell.name)


def _check_cell(cell: Cell, seen: set[str]) -> None:
    if not _NAME.fullmatch(cell.name):
        raise UsageError(f"cells.{cell.name}: letters, digits, '.', '_' and '-' make a name")
    if bool(cell.stage) == bool(cell.network):
        raise UsageError(f"cells.{cell.name}: say stage (and train it) or network (one that is there), and not both")
    if cell.stage not in ("", "sla", "rcm"):
        raise UsageError(f"cells.{cell.name}.stage={cell.stage!r}: choose sla or rcm")
    if (cell.network == "merge") != bool(cell.merge_sla and cell.merge_rcm):
        raise UsageError(f"cells.{cell.name}: network: merge goes with merge_sla and merge_rcm")
    unknown = [name for name in cell.needs if name not in seen]
    if unknown:
        raise UsageError(f"cells.{cell.name}: needs {', '.join(unknown)}, which no cell before it is called")
    if not cell.rows:
        raise UsageError(f"cells.{cell.name}: rows: at least one is needed")
    for row in cell.rows:
        where = f"cells.{cell.name}.rows.{row.name}"
        if not _NAME.fullmatch(row.name):
            raise UsageError(f"{where}: letters, digits, '.', '_' and '-' make a name")
        if row.sampler not in SAMPLERS:
            raise UsageError(f"{where}.sampler={row.sampler!r}: choose one of {', '.join(SAMPLERS)}")
        if row.steps < 1 or (row.sampler == "turbo" and row.steps > 4):
            raise UsageError(f"{where}.steps={row.steps}: 1 to 4 with the Turbo sampler, at least 1 with the teacher's")
        if row.layer_budget and not LAYER_TOPKS[0] <= row.layer_budget <= 1:
            raise UsageError(f"{where}.layer_budget={row.layer_budget}: 0 for none, or {LAYER_TOPKS[0]} to 1")
        try:
            AttentionConfig.from_dict({"kind": "sla", **row.attention})
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
        _check_quantize(f"{where}.quantize", row)


def _check_quantize(where: str, row: Row) -> None:
    extra = sorted(set(row.quantize) - set(QUANTIZE))
    if extra:
        raise UsageError(f"{where}: has no field {', '.join(extra)}; its fields are {', '.join(QUANTIZE)}")
    scheme = row.quantize.get("scheme", SCHEMES[0])
    if scheme not in SCHEMES:
        raise UsageError(f"{where}.scheme={scheme!r}: choose one of {', '.join(SCHEMES)}")
    for name in ("smooth", "weights_only"):
        _check_type(f"{where}.{name}", row.quantize.get(name, False), (bool,))
    target = row.quantize.get("target_error", 0.0)
    _check_type(f"{where}.target_error", target, (int, float))
    if not target >= 0:
        raise UsageError(f"{where}.target_error={target}: must not be negative")
    steps = row.quantize.get("finetune", 0)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise UsageError(f"{where}.finetune={steps!r}: a number of steps, or 0 for none")
    for name, value in (("target_error", target), ("finetune", steps)):
        if value and row.quantize.get("weights_only"):
            raise UsageError(f"{where}.{name}={value}: goes without weights_only, which rounds and nothing more")
    if steps and row.attention.get("kind") == "sage_sla":
        raise UsageError(f"{where}.finetune={steps}: sage_sla attention has no gradient; take kind: sla")
