"""The recipes of published networks: their numbers, and each kind run whole on a tiny network with data that its teacher made."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from recipe_world import ROOT, read_metrics, read_status, train_here, weights
from tiny_wan import KINDS, run_arguments, use_tiny, write_model, write_picture

from turbotrain.checkpoint import read_meta
from turbotrain.compose import UsageError, recipe_names
from turbotrain.config import Config, load_config
from turbotrain.data.latents import LatentDataset
from turbotrain.diffusion.velocity import Velocity
from turbotrain.losses import LossOutput, critic
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS
from turbotrain.model.wan import WanTransformer
from turbotrain.stages.artifacts import attention_config
from turbotrain.stages.context import Passes, StageContext
from turbotrain.stages.rcm import StepWork
from turbotrain.training.flops import forward_flops
from turbotrain.training.meter import PEAK_FLOPS

sys.path.insert(0, str(ROOT / "tools"))
import build_dataset

RECIPES = {
    "wan2.1_t2v_1.3b_480p": "t2v",
    "wan2.1_i2v_14b": "i2v",
    "wan2.2_ti2v_5b": "ti2v",
    "wan2.2_i2v_a14b": "two experts",
}
WAN = [name for name in recipe_names() if name.startswith("wan") and not name.endswith("_lora")]  # test_lora_recipes.py


@cache
def composed(recipe: str) -> Config:
    return load_config([f"recipe={recipe}"])


@pytest.fixture(autouse=True)
def _tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tiny" in request.keywords:
        use_tiny(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(model, shards) of each kind: the shards drawn from the model by tools/build_dataset.py."""
    folder = tmp_path_factory.mktemp("wan")
    write_picture(folder / "a.png")
    (folder / "list.jsonl").write_text(
        "\n".join(f'{{"prompt": "a {word} thing", "image": "a.png"}}' for word in ("red", "green", "blue"))
    )
    (folder / "list.txt").write_text("a red thing\na green thing\na blue thing\n")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch)
        for kind, name in KINDS.items():
            model, shards = write_model(folder / kind, name), folder / f"{kind} shards"
            source = folder / ("list.txt" if kind == "t2v" else "list.jsonl")
            given = ["--model", str(model), "--variant", name, "-o", str(shards), "--device", "cpu", "--steps", "2"]
            assert build_dataset.main(["teacher", str(source), *given, "--samples-per-shard", "2"]) == 0
            found[kind] = (model, shards)
    return found


def arguments(recipe: str, model: Path, shards: Path, output: Path, *more: str) -> list[str]:
    return [
        *run_arguments(recipe, model, shards, output),
        "attention.block_q=16",
        "attention.block_k=16",
        "sla.steps=2",
        "sla.batch_size=2",
        "sla.sample_every=2",
        # The recipe's own stages of rcm, a step or two each.
        "rcm.phases=[{cm: dcm, dmd: false, steps: 1}, {cm: scm, dmd: false, steps: 1}, {cm: scm, dmd: true, steps: 4}]",
        "rcm.tangent_warmup=1",
        "rcm.student_update_freq=2",
        "rcm.batch_size=2",
        "quantize.prompts=1",
        "quantize.held_out_prompts=1",
        "quantize.alphas=[0.5]",
        *more,
    ]


# ---- their numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", WAN)
def test_networks_are_built_and_hold_the_published_parameters(recipe: str) -> None:
    config = composed(recipe)
    variant = VARIANTS[config.model.variant]
    with torch.device("meta"):
        network = WanTransformer(variant.config, AttentionConfig("sla"))
    projections = variant.config.num_layers * (128 * 128 + 128)
    published = {  # formats.md, section 1, billions; None: P of SLA is not in it
        "wan2.1_t2v_1.3b": 1.419,
        "wan2.1_t2v_14b": 14.288,
        "wan2.1_i2v_14b": 16.395,
        "wan2.2_t2v_a14b": 14.288,
        "wan2.2_i2v_a14b": 14.289,
        "wan2.2_ti2v_5b": 5.000,
    }[variant.name]
    assert (sum(p.numel() for p in network.parameters()) - projections) / 1e9 == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("recipe", WAN)
def test_published_hyper_parameters(recipe: str) -> None:
    """formats.md, section 11; what is published for 1.3B and for 14B."""
    config = composed(recipe)
    rcm, sla, small = config.rcm, config.sla, recipe.endswith("1.3b_480p")
    assert (rcm.optim.lr, rcm.critic_optim.lr) == ((2e-6, 4e-7) if small else (1e-6, 1e-7))
    assert rcm.optim.betas == rcm.critic_optim.betas == [0.0, 0.999]
    assert rcm.optim.weight_decay == rcm.critic_optim.weight_decay == 0.01
    assert (rcm.times_cm.kind, rcm.times_cm.mean, rcm.times_cm.std) == ("lognormal", 0.7 if small else 1.5, 1.6)
    assert (rcm.times_dmd.kind, rcm.times_dmd.shift) == ("uniform_shift", 5.0)
    assert (rcm.loss_scale, rcm.dmd_loss_scale, rcm.ema_rate) == (100.0, 1.0, 0.1)
    assert (rcm.student_update_freq, rcm.tangent_warmup) == ((5, 1000) if small else (10, 0))
    assert rcm.steps == (10_000 if small else 4_000)
    assert [(phase.cm, phase.dmd) for phase in rcm.phases] == [("dcm", False), ("scm", False), ("scm", True)]
    assert (sla.optim.lr, sla.optim.betas, sla.objective) == (1e-5, [0.9, 0.999], "white_box")
    assert (sla.times.kind, sla.times.mean, sla.times.std, sla.batch_size) == (
        "lognormal",
        1.5,
        1.6,
        16 if small else 128,
    )
    assert (config.attention.topk, config.attention.block_q, config.attention.block_k) == (0.1, 64, 64)
    sigma = {"wan2.1_t2v_14b_480p": 200, "wan2.1_t2v_14b_720p": 120, "wan2.1_i2v_14b": 200, "wan2.2_i2v_a14b": 200}
    assert config.sampler.sigma_max == sigma.get(recipe, 80)
    variant = VARIANTS[config.model.variant]
    teacher = config.sampler.teacher
    assert (teacher.steps, teacher.shift, teacher.guidance) == (variant.teacher_steps, variant.shift, variant.cfg[0])
    assert config.data.fps == variant.fps


def test_computed_memory_is_what_the_page_says() -> None:
    """docs/wan_recipes.md: state, block inputs, arithmetic and disk of every recipe, computed again."""
    rows = [
        line.split("|")[1:-1]
        for line in (ROOT / "docs" / "wan_recipes.md").read_text().splitlines()
        if "| `wan" in line
    ]
    assert sorted(row[0].strip(" `") for row in rows) == WAN
    for name, *figures in rows:
        config = composed(name.strip(" `"))
        variant = VARIANTS[config.model.variant]
        network = variant.config
        channels, length, height, width = variant.latent_shape(
            config.data.frames, config.data.height, config.data.width
        )
        cells = length * height * width
        sla = AttentionConfig("sla", config.attention.topk, config.attention.block_q, config.attention.block_k)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in WanTransformer(network, sla).parameters())
        tokens = cells // 4
        dense, sparse = (
            forward_flops(network, how, (length, height, width)) / 1e15 for how in (AttentionConfig(), sla)
        )
        numbers = channels * cells + network.text_len * network.text_dim
        numbers += cells * network.condition_channels if network.model_type == "i2v" else 0
        numbers += 257 * network.image_dim if network.image_dim else 0
        assert [figure.strip() for figure in figures] == [
            f"{parameters / 1e6:.1f} M",
            f"{tokens:,}",
            f"{18 * parameters / 1e9:.1f} GB",
            f"{38 * parameters / 1e9:.1f} GB",
            f"{2 * tokens * network.dim * network.num_layers / 1e9:.1f} GB",
            f"{dense:.2f} / {sparse:.2f}",
            f"{2 * numbers / 1e6:.1f} MB",
        ], name


def test_computed_seconds_are_what_the_pages_say(tmp_path: Path) -> None:
    """docs/wan_recipes.md and the recipes' pages: FLOPs of a step at the MFU that 1.3B has in the measurement."""
    runs = json.loads((ROOT / "docs" / "measurements" / "h200_training_1.3b_480p.json").read_text())["runs"]
    mfu = {row["kind"]: row["mfu"] for row in runs[0]["rows"] if row["case"] in ("sla", "dcm", "scm", "dmd")}
    text = (ROOT / "docs" / "wan_recipes.md").read_text().partition("### Steps that were not timed")[2]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| wan")]
    assert {row[0].strip().removesuffix(", high") for row in rows} == {*WAN} - {"wan2.1_t2v_1.3b_480p"}
    for name, *figures in rows:
        recipe, _, high = name.strip().partition(", ")
        config = composed(recipe)
        context = StageContext("rcm", config, tmp_path, {}, Accelerator(cpu=True))
        sparse, dense = attention_config(config), AttentionConfig()
        step = StepWork(context, sparse, dense, sparse if high else None)
        work = {
            "sla": context.work(config.rcm.batch_size, Passes(sparse, 1.0, 1.0), Passes(dense, 1.0, trained=False)),
            "dcm": step.student("dcm", dmd=False),
            "scm": step.student("scm", dmd=False),
            "scm+dmd": step.student("scm", dmd=True),
            "critic": step.critic(),
        }
        said = [figure.strip() for figure in figures]
        rate = PEAK_FLOPS["H200"] * config.rcm.batch_size
        assert said == [f"{work[kind].flops / (rate * mfu[kind]):.1f}" for kind in work], name
        page = "SLA {}, dcm {}, scm {}, scm + dmd {}, critic {}".format(*said)
        assert page in (ROOT / "recipes" / f"{recipe}.md").read_text(), name


def test_two_experts_need_a_choice() -> None:
    for overrides, words in (
        (["recipe=wan2.2_t2v_a14b", "model.expert=''"], "model.expert=''.*choose one of high, low"),
        (["recipe=wan2.2_t2v_a14b", "stages=[quantize]"], "quantize.*both experts"),
        (["recipe=shapes", "model.expert=low"], "model.expert='low': shapes has one network"),
        (["recipe=shapes", "data.first_frame=0.5"], "data.first_frame=0.5.*only ti2v"),
    ):
        with pytest.raises(UsageError, match=words):
            load_config(overrides)
    run = load_config(["recipe=wan2.2_t2v_a14b", "model.expert=high"]).run_folder
    assert run == Path("outputs/wan2.2_t2v_a14b/high")


# ---- whole, at tiny size --------------------------------------------------------------------------------------------


@pytest.mark.tiny
@pytest.mark.parametrize("recipe", ["wan2.1_t2v_1.3b_480p", "wan2.1_i2v_14b", "wan2.2_ti2v_5b"])
def test_whole_recipes(recipe: str, made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    kind = RECIPES[recipe]
    assert train_here(*arguments(recipe, *made[kind], tmp_path)) == 0
    run = tmp_path / recipe
    assert [read_status(run / stage)["status"] for stage in ("sla", "rcm", "quantize")] == ["done"] * 3
    lines = read_metrics(run / "rcm")
    assert [line["role"] for line in lines] == ["student"] * 2 + ["critic", "student"] * 2
    assert "dcm" in lines[0]
    assert "scm" in lines[1]
    assert {"scm", "dmd"} <= lines[-1].keys()
    assert (run / "sla" / "samples" / "step_00000002.png").is_file()
    meta = read_meta(run / "quantize" / "checkpoint")
    assert [entry["stage"] for entry in meta.lineage] == ["sla", "rcm", "quantize"]
    wanted = {"vae", "text_encoder", "tokenizer", *(["image_encoder"] if kind == "i2v" else [])}
    assert set(meta.components) == wanted, "infer.py needs no other flag"


@pytest.mark.tiny
def test_a_student_by_lora_is_sampled_and_quantised_like_any(
    made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Over bf16 weights, as the Wan recipes train."""
    recipe = "wan2.1_t2v_1.3b_480p"
    assert train_here(*arguments(recipe, *made["t2v"], tmp_path, "lora.rank=4", "rcm.sample_every=3")) == 0
    run = tmp_path / recipe
    assert (run / "sla" / "samples" / "step_00000002.png").is_file()
    assert (run / "rcm" / "samples" / "step_00000003.png").is_file()
    assert {tensor.dtype for tensor in weights(run / "rcm").values()} == {torch.float32}
    assert read_meta(run / "quantize" / "checkpoint").quantization is not None


@pytest.mark.tiny
def test_given_frames_stay_and_are_left_out(
    made: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shards = made["ti2v"]
    dataset = LatentDataset(shards)
    first_frames = dataset.batch(range(len(dataset))).latent_BCTHW[:, :, 0]
    seen = []

    def noting(fake: Velocity, generated: torch.Tensor, *given: Any, mask: torch.Tensor) -> LossOutput:
        assert not mask[:, :, 0].any()
        assert mask[:, :, 1:].all()
        seen.extend(min(float((row[:, 0] - frame).abs().max()) for frame in first_frames) for row in generated)
        return critic(fake, generated, *given, mask=mask)

    monkeypatch.setattr("turbotrain.stages.rcm.critic", noting)
    only_score = "rcm.phases=[{cm: none, dmd: true, steps: 3}]"
    overrides = arguments("wan2.2_ti2v_5b", model, shards, tmp_path, "stages=[rcm]", only_score, "data.first_frame=1")
    assert train_here(*overrides) == 0
    assert seen == [0.0] * 4, "two critic steps of two samples"


@pytest.mark.tiny
def test_one_expert_after_the_other(
    made: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, shards = made["two experts"]
    low = arguments("wan2.2_i2v_a14b", model, shards, tmp_path)
    high = [*low, "model.expert=high"]
    asked: list[float] = []
    forward = WanTransformer.forward

    def noting(self: WanTransformer, x: torch.Tensor, timestep: torch.Tensor, *given: Any, **more: Any) -> Any:
        asked.extend(timestep.flatten().tolist())
        return forward(self, x, timestep, *given, **more)

    monkeypatch.setattr(WanTransformer, "forward", noting)
    assert train_here(*high) == 2
    assert "train that one first, with model.expert=low" in capsys.readouterr().err
    assert train_here(*low) == 0
    assert max(asked) <= 900 + 1e-9
    asked.clear()
    assert train_here(*high) == 0
    # The later point of a discrete step may lie below: s = shift(u_b - 1/48, 5) with u_b = .9 / 1.4.
    assert min(asked) > 888
    assert 900 in asked, "the experts are compared at the boundary"
    run = tmp_path / "wan2.2_i2v_a14b"
    assert all("boundary" not in line for line in read_metrics(run / "low" / "rcm"))
    assert ["boundary" in line for line in read_metrics(run / "high" / "rcm")][:2] == [False, True]
    one, other = weights(run / "low" / "rcm"), weights(run / "high" / "rcm")
    assert any(not torch.equal(one[name], other[name]) for name in one)
    begun = weights_of(model / "high")
    assert max(float((other[name] - begun[name]).abs().max()) for name in begun) < 1e-3, "began with its own expert"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.tiny
def test_prompts_alone_distil_by_score(
    made: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = made["t2v"]
    (tmp_path / "list.txt").write_text("a red thing\na green thing\n")
    shards = tmp_path / "prompts"
    given = ["--model", str(model), "--variant", KINDS["t2v"], "-o", str(shards), "--device", "cpu"]
    assert build_dataset.main(["prompts", str(tmp_path / "list.txt"), *given]) == 0
    overrides = arguments("wan2.1_t2v_1.3b_480p", model, shards, tmp_path / "out", "stages=[rcm]")
    assert train_here(*overrides) == 1
    assert "holds prompts only" in capsys.readouterr().err
    assert train_here(*overrides, "rcm.phases=[{cm: none, dmd: true, steps: 4}]") == 0
    roles = [line["role"] for line in read_metrics(tmp_path / "out" / "wan2.1_t2v_1.3b_480p" / "rcm")]
    assert roles == ["critic", "student"] * 2


@pytest.mark.tiny
def test_shards_without_images_are_refused(
    made: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = arguments("wan2.1_i2v_14b", made["i2v"][0], made["t2v"][1], tmp_path / "out")
    assert train_here(*overrides) == 1
    assert "holds no y.pt, clip.pt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
