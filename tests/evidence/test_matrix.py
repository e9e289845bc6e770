"""What a matrix may say, and what is told to who says something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_matrix import MATRIX

from turbotrain.compose import UsageError
from turbotrain.config import load_config
from turbotrain.evidence.matrix import Row, load_matrix

REPOSITORY = Path(__file__).resolve().parents[2]


def test_cells_rows_and_what_they_need(matrix_file: Path) -> None:
    matrix = load_matrix(matrix_file)
    assert [(cell.name, row.name) for cell, row in matrix.rows] == [
        ("teacher", "s2"), ("sla010", "s2"), ("turbo", "s1"), ("turbo", "int8_4"), ("copy", "s1")
    ]  # fmt: skip
    turbo = matrix.cell("turbo")
    assert turbo.needs == ("sla010",)
    assert turbo.overrides({"sla010": Path("/x/y")}) == ["model.sla=/x/y", "sla.steps=3"]
    assert matrix.cell("copy").needs == ("turbo",)
    with pytest.raises(UsageError, match="nobody"):
        matrix.cell("nobody")


def test_passes_through_the_network() -> None:
    assert Row("a", 4).evaluations == 4
    assert Row("a", 50, "teacher").evaluations == 100
    assert Row("a", 50, "teacher", settings={"guidance": 1}).evaluations == 50


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("title: Turbo\n", "titel: Turbo\n", "cells.turbo: has no field titel"),
        ("    stage: rcm\n", "", "cells.turbo: say stage .* or network"),
        ("stage: rcm", "stage: dmd", "stage='dmd'"),
        ("<sla010>", "<sla011>", "cells.turbo: needs sla011"),
        ("s1: {steps: 1}\n      int8", "s1: {steps: 5}\n      int8", "steps=5: 1 to 4"),
        ("{scheme: int8_channel}", "{schema: int8_channel}", "quantize: has no field schema"),
        ("{scheme: int8_channel}", "{scheme: int3}", "quantize.scheme='int3': choose one of int8_channel"),
        ("{scheme: int8_channel}", "{smooth: 1}", "quantize.smooth=1: expected bool"),
        ("{scheme: int8_channel}", "{target_error: -1}", "quantize.target_error=-1: must not"),
        ("{scheme: int8_channel}", "{}, layer_budget: 3", "int8_4.layer_budget=3: 0 for none, or 0.025 to 1"),
        ("{scheme: int8_channel}", "{}, attention: {top_k: 1}", "int8_4: attention has no field top_k"),
        ("{scheme: int8_channel}", "{}, mass: 1", "int8_4.mass=1: expected bool"),
        ("train: [attention.topk=0.1]", "train: attention.topk=0.1", "sla010.train='attention.topk=0.1': .* list"),
        ("base: [data]", "base: data", "base='data': expected a list"),
        ("prompts: 2", "prompts: '2'", "prompts='2': expected int"),
        ("{s1: {steps: 1}}}", "{s1: 1}}", "cells.copy.rows.s1=1: expected a mapping"),
        ("{scheme: int8_channel}", "{finetune: many}", "quantize.finetune='many': a number of steps"),
        ("{scheme: int8_channel}", "{finetune: 2, weights_only: true}", "finetune=2: goes without weights_only"),
        (
            "{scheme: int8_channel}",
            "{target_error: 0.1, weights_only: true}",
            "target_error=0.1: goes without weights_only",
        ),
        ("{scheme: int8_channel}", "{finetune: 2}, attention: {kind: sage_sla}", "finetune=2: sage_sla .* no gradient"),
        ("{steps: 4, quantize", "{quantize", "int8_4: .*steps"),
        ("prompts: 2", "prompts: 1", "prompts=1: must be at least 2"),
        ("s2: {sampler: teacher, steps: 2}\n", "s2: {steps: 2}\n", "first cell must be the teacher's"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in MATRIX
    path = tmp_path / "wrong.yaml"
    path.write_text(MATRIX.replace(old, new, 1))
    with pytest.raises(UsageError, match=words):
        load_matrix(path)
    with pytest.raises(UsageError, match="no such file"):
        load_matrix(tmp_path / "absent.yaml")


# Each kind of override once: a second goes into every composition.
@pytest.mark.parametrize("name", ["turbo", "dmd", "dcm", "sparse_only", "black_box", "blocks64"])
def test_trainings_of_the_shipped_matrix_are_sound_configurations(name: str) -> None:
    matrix = load_matrix(REPOSITORY / "configs" / "evidence" / "shapes_h200.yaml")
    paths = {cell.name: Path("/checkpoints") / cell.name for cell in matrix.cells}
    cell = matrix.cell(name)
    given = [f"recipe={matrix.recipe}", f"stages=[{cell.stage}]", "data.kind=shards", "data.path=/shards"]
    config = load_config([*given, *matrix.common, *cell.overrides(paths)])
    assert config.data.frames == 81
