"""Top-k by layer through train.py: chosen from the teacher before SLA trains, kept by resume, carried on by what follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_world import World, read_metrics, train_here, train_on, weights
from test_ranks import assert_weights_agree
from tiny_world import tiny_arguments

import turbotrain.recipe
from turbotrain.checkpoint import load_transformer, read_meta
from turbotrain.evaluation.attention_mass import attention_mass, share_out
from turbotrain.model.attention_config import LAYER_TOPKS, AttentionConfig
from turbotrain.stages import layer_budget

# Four key blocks: a top-k below 0.5 keeps one of them, 0.5 two. Of two layers one gets the second block.
BUDGET = "sla.layer_budget=0.3"


@pytest.fixture(scope="module")
def run(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("budget")
    assert train_here(*tiny_arguments(tiny, output, BUDGET)) == 0
    return output / "run"


def choice(run: Path) -> dict[str, Any]:
    return json.loads((run / "sla" / layer_budget.CHOICE_FILE).read_text())


def test_sla_trains_with_what_was_chosen_and_rcm_goes_on_with_it(run: Path, tiny_whole: Path) -> None:
    found = choice(run)
    chosen = found["layer_topk"]
    assert len(set(chosen)) == 2
    assert sum(chosen) <= 0.6
    assert chosen == share_out([[layer] for layer in found["mass"]], LAYER_TOPKS, 0.3)
    for stage in ("sla", "rcm"):
        assert read_meta(run / stage / "checkpoint").attention["layer_topk"] == chosen
        network = load_transformer(run / stage / "checkpoint")
        operators: list[Any] = [block.get_submodule("self_attn.attn_op") for block in network.blocks]
        assert [operator.config.topk for operator in operators] == chosen
    assert read_metrics(run / "sla")[0]["loss"] != read_metrics(tiny_whole / "sla")[0]["loss"]


def test_mass_is_the_teachers_in_the_students_order_of_tokens(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def watched(network: Any, made: Any, *more: Any) -> Any:
        calls.extend(made)
        return attention_mass(network, calls, *more)

    monkeypatch.setattr(layer_budget, "attention_mass", watched)
    arguments = tiny_arguments(tiny, tmp_path, BUDGET, "stages=[sla]", "attention.order=cube", "sla.steps=1")
    assert train_here(*arguments) == 0
    stored = read_meta(tmp_path / "run" / "sla" / "checkpoint").attention
    assert stored["order"] == "cube"
    assert len(calls) == layer_budget.MEASURED_STEPS
    # The teacher with all blocks kept is the same network in the order that is asked for.
    student = AttentionConfig.from_dict({**stored, "layer_topk": [1.0, 1.0]})
    teacher = load_transformer(tiny.teacher, attention=student)
    found = attention_mass(teacher, calls, LAYER_TOPKS, student)
    mass = torch.tensor(found).mean(1)
    torch.testing.assert_close(mass, torch.tensor(choice(tmp_path / "run")["mass"]), rtol=1e-4, atol=1e-5)


def test_resume_keeps_the_choice(tiny: World, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    arguments = tiny_arguments(tiny, tmp_path, BUDGET, "stages=[sla]")
    with monkeypatch.context() as patch:
        patch.setattr(turbotrain.recipe, "finish", killed)
        assert train_here(*arguments) == 1
    monkeypatch.setattr(layer_budget, "attention_mass", killed)  # what is chosen is not measured again
    assert train_here(*arguments) == 0
    assert choice(tmp_path / "run") == choice(run)
    left, right = weights(tmp_path / "run" / "sla"), weights(run / "sla")
    assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("more", [("launch.engine=fsdp2",), ("launch.context_parallel=2",)], ids=["fsdp2", "context"])
def test_two_processes_choose_what_one_does(more: tuple[str, ...], tiny: World, run: Path, tmp_path: Path) -> None:
    train_on(2, *tiny_arguments(tiny, tmp_path, BUDGET, "stages=[sla]", *more))
    assert choice(tmp_path / "run")["layer_topk"] == choice(run)["layer_topk"]
    # Sums over samples and heads are taken in another order.
    mass, expected = (torch.tensor(choice(folder)["mass"]) for folder in (tmp_path / "run", run))
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-6)
    assert_weights_agree(tmp_path / "run" / "sla", run / "sla", tiny.teacher)


def test_adapters_and_merges_carry_it(tiny: World, tmp_path: Path) -> None:
    short = (BUDGET, "sla.steps=1", "rcm.phases=[{cm: scm, dmd: false, steps: 1}]")
    assert train_here(*tiny_arguments(tiny, tmp_path / "lora", *short, "lora.rank=4")) == 0
    merging = ("stages=[sla,rcm,merge]", "rcm.composition=merge")
    assert train_here(*tiny_arguments(tiny, tmp_path / "merge", *short, *merging)) == 0
    for folder, stage in (("lora", "rcm"), ("merge", "merge")):
        run = tmp_path / folder / "run"
        assert read_meta(run / stage / "checkpoint").attention["layer_topk"] == choice(run)["layer_topk"]


def test_runs_without_a_budget_are_as_they_were(tiny_whole: Path) -> None:
    record = json.loads((tiny_whole / "sla" / "stage.json").read_text())
    assert not any("layer_budget" in setting for setting in record["fingerprint"])
    assert not (tiny_whole / "sla" / layer_budget.CHOICE_FILE).exists()
