"""Teachers that answer faster or in less memory: in 8 bits, or with the sla stage's attention."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_world import World, read_metrics, train_here, weights
from tiny_world import tiny_arguments

from turbotrain.compose import UsageError
from turbotrain.config import load_config
from turbotrain.model.quant_linear import QuantLinear
from turbotrain.model.wan import WanTransformer
from turbotrain.recipe import SPECS
from turbotrain.records import make_fingerprint
from turbotrain.stages import context


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[WanTransformer]:
    """The networks that stages only ask, as they are made."""
    made: list[WanTransformer] = []
    make = context.make_frozen

    def remembered(*arguments: Any) -> WanTransformer:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(context, "make_frozen", remembered)
    return made


def test_the_sla_stage_can_be_the_teacher(
    tiny: World, tiny_whole: Path, tmp_path: Path, frozen: list[WanTransformer]
) -> None:
    shutil.copytree(tiny_whole / "sla", tmp_path / "run" / "sla")
    more = ["stages=[rcm]", "rcm.teacher_attention=sage_sla"]
    assert train_here(*tiny_arguments(tiny, tmp_path, *more)) == 0
    (teacher,) = frozen
    assert teacher.attention_config.kind == "sage_sla"
    trained = weights(tiny_whole / "sla")
    assert all(torch.equal(value, trained[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    lines, dense = read_metrics(tmp_path / "run" / "rcm"), read_metrics(tiny_whole / "rcm")
    # Another teacher of about the same opinion.
    assert lines[0]["loss"] != dense[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(dense[0]["loss"], rel=0.2)


def test_a_teacher_in_8_bits_answers_nearly_the_same(
    tiny: World, tiny_whole: Path, tmp_path: Path, frozen: list[WanTransformer]
) -> None:
    assert train_here(*tiny_arguments(tiny, tmp_path, "stages=[sla]", "model.teacher_scheme=int8_channel")) == 0
    (teacher,) = frozen
    linears = [layer for layer in teacher.blocks.modules() if isinstance(layer, QuantLinear)]
    assert len(linears) == 10 * len(teacher.blocks)
    assert {layer.scheme for layer in linears} == {"int8_channel"}
    lines, floats = read_metrics(tmp_path / "run" / "sla"), read_metrics(tiny_whole / "sla")
    for line, other in zip(lines, floats, strict=True):
        assert line["loss"] != other["loss"]
        assert line["loss"] == pytest.approx(other["loss"], rel=0.3)


def test_another_scheme_is_another_stage(tiny: World, tmp_path: Path) -> None:
    given = tiny_arguments(tiny, tmp_path)
    for stage, is_taught in (("sla", True), ("rcm", True), ("teacher", False)):
        of_floats, of_8_bits = (
            make_fingerprint(load_config([*given, f"model.teacher_scheme={scheme}"]), SPECS[stage].sections, {})
            for scheme in ("", "int8_channel")
        )
        assert (of_floats != of_8_bits) == is_taught, stage


def test_fine_tuning_that_is_off_makes_nothing_stale(tiny: World, tmp_path: Path) -> None:
    given = tiny_arguments(tiny, tmp_path)

    def fingerprint(*said: str) -> dict[str, Any]:
        tuned = [f"quantize.finetune.{setting}" for setting in said]
        return make_fingerprint(load_config([*given, *tuned]), SPECS["quantize"].sections, {})

    plain, tuned = fingerprint(), fingerprint("steps=5")
    assert not any("finetune" in setting for setting in plain), "as runs from before there was fine-tuning have it"
    assert fingerprint("lr=0.1") == plain
    assert tuned != plain
    assert fingerprint("steps=5", "lr=0.1") != tuned


def test_an_sla_teacher_needs_the_stage(tiny: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*tiny_arguments(tiny, tmp_path, "stages=[rcm]", "rcm.teacher_attention=sla")) == 2
    assert "the finished stage sla" in capsys.readouterr().err


REFUSED = {
    "model.teacher_scheme=int4": "model.teacher_scheme='int4'",
    "rcm.teacher_attention=sparse": "rcm.teacher_attention='sparse'",
    "rcm.teacher_attention=sla rcm.composition=joint": "rcm.composition=sequential",
    "model.teacher_scheme=int8_channel lora.rank=4": "share their weights",
    "rcm.teacher_attention=sla lora.rank=4": "share their weights",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_settings_that_cannot_be(overrides: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[overrides]):
        load_config(["recipe=shapes", *overrides.split()])
