"""Turbo-LoRA through train.py: one set of weights, adapters that travel from SLA to rCM, resume, and files for others."""

from __future__ import annotations

import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import WanLoraLoaderMixin
from recipe_world import World, read_metrics, train_here, train_on, weights
from safetensors.torch import load_file
from tiny_world import TINY, tiny_arguments

import turbotrain.stages.rcm as rcm_stage
from turbotrain.checkpoint import load_transformer, read_meta
from turbotrain.checkpoint.lora import LORA_FILE, read_lora
from turbotrain.config import load_config
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.lora import add_lora, over_same_weights
from turbotrain.model.variants import VARIANTS
from turbotrain.model.wan import WanTransformer
from turbotrain.stages import context
from turbotrain.training.roles import Role

ROOT = Path(__file__).resolve().parents[2]
RANK = 4
LORA = (f"lora.rank={RANK}", "lora.alpha=8")


def arguments(tiny: World, output: Path, *more: str) -> list[str]:
    return tiny_arguments(tiny, output, *LORA, *more)


@pytest.fixture(scope="module")
def run(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SLA and rCM with LoRA, without interruption."""
    output = tmp_path_factory.mktemp("lora")
    assert train_here(*arguments(tiny, output)) == 0
    return output / "run"


def test_checkpoints_are_whole_networks_and_adapters_lie_beside_them(tiny: World, run: Path) -> None:
    teacher = load_file(tiny.teacher / "model.safetensors")
    for stage in ("sla", "rcm"):
        merged = weights(run / stage)
        change, said = read_lora(run / stage / "lora" / LORA_FILE)
        assert said is not None
        assert said.variant == TINY
        meta = read_meta(run / stage / "checkpoint")
        assert (meta.attention["kind"], meta.dtype) == ("sla", "float32")
        assert load_transformer(run / stage / "checkpoint").attention_config.kind == "sla"
        layers = 10 * VARIANTS[TINY].config.num_layers
        assert sum(name.endswith(".lora_A.weight") for name in change) == layers
        for name, before in teacher.items():
            module = name.removesuffix(".weight")
            if f"{module}.lora_A.weight" in change:
                low, high = change[f"{module}.lora_A.weight"], change[f"{module}.lora_B.weight"]
                assert low.shape[0] == RANK
                torch.testing.assert_close(merged[name], before + high @ low, rtol=1e-5, atol=1e-6)
                assert not torch.equal(merged[name], before), name
            else:
                assert torch.equal(merged[name], before), "frozen"
        projections = [name for name in change if ".proj_l." in name]
        assert all(torch.equal(change[name], merged[name]) for name in projections)
        assert any(change[name].count_nonzero() for name in projections)
    assert {line["role"] for line in read_metrics(run / "rcm")} == {"student", "critic"}


def test_rcm_goes_on_with_the_adapter_of_sla_over_the_teachers_weights(
    tiny: World, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run / "sla", tmp_path / "run" / "sla")
    began = {}

    def noting(*given: object, **more: object) -> None:
        task = given[0]
        assert isinstance(task, rcm_stage.RcmTask)
        student, critic = (task.roles[name].network for name in ("student", "critic"))
        for network in (student, critic):
            for name, p in task.teacher.named_parameters():
                assert network.get_parameter(name).data_ptr() == p.data_ptr(), "one set of weights for all"
        began.update({name: p.detach().clone() for name, p in task.roles["student"].parameters.items()})
        average = task.roles["student"].average
        assert average is not None
        assert average.shadow.keys() == began.keys(), "the average is of what is trained"
        raise KeyboardInterrupt

    monkeypatch.setattr(rcm_stage, "train", noting)
    assert train_here(*arguments(tiny, tmp_path, "stages=[rcm]")) == 1
    change, _ = read_lora(run / "sla" / "lora" / LORA_FILE)
    for name, tensor in began.items():
        scale = 8 / RANK if name.endswith("lora_B") else 1.0
        saved = change[f"{name}.weight" if name.endswith(("lora_A", "lora_B")) else name]
        assert torch.equal(scale * tensor, saved), name


@pytest.mark.parametrize("lora", [(), LORA])
def test_no_stage_keeps_the_networks_of_the_one_before(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: tuple[str, ...]
) -> None:
    made: list[weakref.ref[WanTransformer]] = []
    make, left = context.make_role, []

    def noting(*given: Any) -> Role:
        made.append(weakref.ref(next(one for one in given if isinstance(one, WanTransformer))))
        return make(*given)

    def in_place_of_rcm(_: object) -> dict[str, object]:
        left.extend(network() is not None for network in made)
        return {}

    monkeypatch.setattr(context, "make_role", noting)
    monkeypatch.setattr(rcm_stage, "run", in_place_of_rcm)
    assert train_here(*tiny_arguments(tiny, tmp_path, *lora)) == 0
    assert left == [False]


@pytest.mark.slow
def test_an_interrupted_run_on_two_processes_continues_to_the_same_weights(
    tiny: World, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after two of four steps of rCM by one process, gone on with by two."""
    halves = "launch.walltime_minutes=1e-6", "rcm.save_every=1"
    for _ in range(4):  # sla and rcm stop after each step
        assert train_here(*arguments(tiny, tmp_path, *halves)) == 1
    state = sorted((tmp_path / "run" / "rcm" / "state").iterdir())[-1]
    names = load_file(state / "rank_00000.safetensors").keys()
    assert not [name for name in names if name.endswith("self_attn.q.weight")], "states hold what is trained alone"
    train_on(2, *arguments(tiny, tmp_path))
    for stage in ("sla", "rcm"):
        ours, theirs = weights(tmp_path / "run" / stage), weights(run / stage)
        for name in theirs:
            # Two processes sum in another order.
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_a_network_that_sla_trained_whole_is_distilled_by_lora(
    tiny: World, tiny_whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_whole / "sla", tmp_path / "run" / "sla")
    assert train_here(*arguments(tiny, tmp_path, "stages=[rcm]")) == 0
    assert "sla: stale" in capsys.readouterr().out
    before, after = weights(tmp_path / "run" / "sla"), weights(tmp_path / "run" / "rcm")
    different = {name for name in after if not torch.equal(before[name], after[name])}
    assert different
    assert all(name.endswith(".weight") or ".proj_l." in name for name in different)
    change, _ = read_lora(tmp_path / "run" / "rcm" / "lora" / LORA_FILE)
    name = "blocks.0.self_attn.q"
    low, high = change[f"{name}.lora_A.weight"], change[f"{name}.lora_B.weight"]
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + high @ low, rtol=1e-5, atol=1e-6)


def test_runs_without_lora_are_as_they_were(tiny_whole: Path) -> None:
    record = (tiny_whole / "rcm" / "stage.json").read_text()
    assert '"lora' not in record, "finished stages of earlier versions stay finished"


@pytest.mark.parametrize(
    ("overrides", "status", "words"),
    [
        (["lora.rank=-1"], 2, "lora.rank=-1: must be at least 0"),
        (["lora.alpha=0"], 2, "lora.alpha=0.0: a positive factor"),
        (["lora.targets=[]"], 2, "lora.targets=[]: at least one pattern"),
        (["launch.engine=fsdp2"], 2, "launch.engine='fsdp2': with lora.rank the frozen weights lie whole"),
        (["lora.rank=64"], 1, "lora.rank=64: blocks.0.self_attn.q has only 32 dimensions"),
        (
            ["lora.targets=[attention.*]"],
            1,
            "lora.targets: 'attention.*' fits no linear of a block; there are cross_attn.k",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    overrides: list[str], status: int, words: str, tiny: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*arguments(tiny, tmp_path, *overrides)) == status
    assert words in capsys.readouterr().err


def test_an_adapter_of_another_rank_is_refused(
    tiny: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "sla", tmp_path / "run" / "sla")
    assert train_here(*arguments(tiny, tmp_path, "stages=[rcm]", "lora.rank=2")) == 1
    assert "it is of another rank or another network" in capsys.readouterr().err


def test_an_adapter_of_another_teacher_is_refused(
    tiny: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tiny.teacher, tmp_path / "other")
    with open(other / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    sla = f"model.sla={run / 'sla' / 'checkpoint'}"
    assert train_here(*arguments(tiny, tmp_path, "stages=[rcm]", f"model.teacher={other}", sla)) == 1
    assert "was trained over another teacher than" in capsys.readouterr().err


def test_diffusers_reads_the_adapter_of_a_dense_student(tiny: World, tmp_path: Path) -> None:
    """`stages=[rcm]` with composition merge trains a dense network: what diffusers has a place for."""
    overrides = ["stages=[rcm,sla,merge]", "rcm.composition=merge", "rcm.phases=[{cm: scm, dmd: false, steps: 1}]"]
    assert train_here(*arguments(tiny, tmp_path, *overrides)) == 0
    folder = tmp_path / "run" / "rcm" / "lora"
    state = WanLoraLoaderMixin.lora_state_dict(str(folder))
    assert isinstance(state, dict)
    assert all(name.startswith("transformer.blocks.") for name in state)
    assert state["transformer.blocks.0.attn1.to_q.lora_A.weight"].shape == (RANK, 32)
    assert state["transformer.blocks.0.ffn.net.0.proj.lora_B.weight"].shape == (48, RANK)
    # What its loader asks of every name; P of SLA fails it, and without SLA such an adapter would be nothing.
    assert all("lora" in name for name in state)
    assert not all("lora" in name for name in load_file(tmp_path / "run" / "sla" / "lora" / LORA_FILE))


def test_the_14b_recipe_fits_80_gb_as_its_page_computes() -> None:
    config = load_config(["recipe=wan2.1_t2v_14b_480p_lora"])
    assert config.lora.rank == 32
    variant = VARIANTS[config.model.variant]
    with torch.device("meta"):
        base = WanTransformer(variant.config).set_weight_dtype(torch.bfloat16)
    trained = []
    for attention in (AttentionConfig("sla"), AttentionConfig()):
        network = add_lora(
            over_same_weights(base).set_attention(attention), config.lora.rank, 32.0, config.lora.targets, 0
        )
        trained.append(sum(p.numel() for p in network.parameters() if p.requires_grad))
    latent = variant.latent_shape(config.data.frames, config.data.height, config.data.width)
    student, critic = trained
    figures = {
        "frozen weights": sum(p.nbytes for p in base.parameters()),
        f"student's adapter and P: {student / 1e6:.1f} M": 16 * student,
        "its average": 4 * student,
        f"critic's adapter (rcm with dmd): {critic / 1e6:.1f} M": 16 * critic,
        "inputs of 40 checkpointed blocks": 2
        * math.prod(latent[1:])
        // 4
        * variant.config.dim
        * variant.config.num_layers,
    }
    figures["in all"] = sum(figures.values())
    page = (ROOT / "recipes" / "wan2.1_t2v_14b_480p_lora.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    said = {row[0]: row[-1] for row in rows if len(row) == 3}
    for what, nbytes in figures.items():
        assert [figure for row, figure in said.items() if row.startswith(what)] == [f"{nbytes / 1e9:.2f}"], what
    assert figures["in all"] < 60e9, "a third of the GPU is left for one block and the loss"
