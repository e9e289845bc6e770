"""Bad input is answered with the field, the value and a remedy, within seconds and without importing torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from turbotrain.compose import UsageError, recipe_names
from turbotrain.config import load_config

ROOT = Path(__file__).resolve().parents[2]

BAD = [
    (["recipe=foo"], ["recipe", "foo", "shapes"]),
    ([], ["recipe", "missing"]),
    (["recipe=shapes", "sla.stpes=3"], ["sla.stpes", "sla.steps"]),
    (["recipe=shapes", "+new.key=1"], ["new.key", "unknown"]),
    (["recipe=shapes", "stages=[slaa]"], ["stages", "slaa", "sla"]),
    (["recipe=shapes", "stages=[]"], ["stages", "at least one"]),
    (["recipe=shapes", "stages=[sla,sla]"], ["stages", "once"]),
    (["recipe=shapes", "sla.steps=abc"], ["sla.steps", "abc", "Integer"]),
    (["recipe=shapes", "sla.steps=0"], ["sla.steps", "0", "at least 1"]),
    (["recipe=shapes", "attention.topk=0"], ["attention.topk", "0", "(0, 1]"]),
    (["recipe=shapes", "attention.topk=1.5"], ["attention.topk", "1.5", "(0, 1]"]),
    (["recipe=shapes", "attention.topk=nan"], ["attention.topk", "nan"]),
    (["recipe=shapes", "sla.layer_budget=0.01"], ["sla.layer_budget", "0.01", "0.025 to 1"]),
    (["recipe=shapes", "sla.layer_budget=1.5"], ["sla.layer_budget", "1.5"]),
    (["recipe=shapes", "sla.layer_budget=0.1", "attention=dense"], ["sla.layer_budget", "dense attention"]),
    (["recipe=shapes", "sla.layer_budget=0.1", "rcm.composition=joint"], ["sla.layer_budget", "composition=joint"]),
    (["recipe=shapes", "attention.block_q=48"], ["attention.block_q", "48", "64"]),
    (["recipe=shapes", "model=wan9"], ["model", "wan9", "wan2.1_t2v_1.3b"]),
    (["recipe=shapes", "model.variant=wan9"], ["model.variant", "wan9"]),
    (["recipe=shapes", "data.frames=14"], ["data.frames", "14", "13", "17"]),
    (["recipe=shapes", "data.width=65"], ["data.width", "65", "64", "72"]),
    (["recipe=shapes", "evaluate.turbo_steps=[5]"], ["evaluate.turbo_steps", "5", "1 to 4"]),
    (["recipe=shapes", "evaluate.turbo_steps=[0]"], ["evaluate.turbo_steps", "0", "1 to 4"]),
    (["recipe=shapes", "quantize.steps=5"], ["quantize.steps", "5", "4"]),
    (["recipe=shapes", "quantize.scheme=int4"], ["quantize.scheme", "int4", "int8_channel"]),
    (["recipe=shapes", "quantize.target_latency=1"], ["quantize.target_latency", "1.0", "below 1"]),
    (["recipe=shapes", "quantize.target_latency=-0.5"], ["quantize.target_latency", "-0.5", "a share"]),
    (
        ["recipe=shapes", "quantize.target_latency=0.7", "quantize.target_error=0.01"],
        ["quantize.target_latency", "0.7", "quantize.target_error=0.01", "give one"],
    ),
    (["recipe=shapes", "quantize.finetune.lr=0"], ["quantize.finetune.lr", "0", "(0, 1)"]),
    (["recipe=shapes", "quantize.finetune.steps=-1"], ["quantize.finetune.steps", "-1", "at least 0"]),
    (["recipe=shapes", "quantize.finetune.prompts=0"], ["quantize.finetune.prompts", "0", "at least 1"]),
    (["recipe=shapes", "sla.optim.lr=-1"], ["sla.optim.lr", "-1", "(0, 1)"]),
    (["recipe=shapes", "rcm.phases=[]"], ["rcm.phases", "phase"]),
    (["recipe=shapes", "rcm.phases=[{cm: none, dmd: false, steps: 5}]"], ["rcm.phases[0]", "cm or dmd"]),
    (["recipe=shapes", "rcm.student_update_freq=1"], ["rcm.student_update_freq", "1", "2"]),
    (["recipe=shapes", "rcm.ema_rate=0.5"], ["rcm.ema_rate", "0.5", "0.25"]),
    (["recipe=shapes", "sampler.times=[1.4,1.5,1.0]"], ["sampler.times", "decreasing"]),
    (["recipe=shapes", "sampler.sigma_max=0"], ["sampler.sigma_max", "0"]),
    (["recipe=shapes", "launch.device=tpu"], ["launch.device", "tpu", "cpu"]),
    (["recipe=shapes", "name=a/b"], ["name", "a/b"]),
    (["recipe=shapes", "data.kind=shards"], ["data.path", "shards"]),
    (["recipe=shapes", "sla"], ["sla", "key=value"]),
    (["recipe=shapes", "stages=sla"], ["'stages=[sla]'", "brackets"]),
    (["recipe=shapes", "stages=sla,rcm"], ["'stages=[sla,rcm]'", "brackets"]),
    (["recipe=shapes", "evaluate.turbo_steps=4"], ["'evaluate.turbo_steps=[4]'", "brackets"]),
    (["recipe=shapes", "sla.batch_size=6", "launch.micro_batches=4"], ["sla.batch_size=6", "micro_batches=4", "4"]),
    *(
        (["recipe=shapes", "launch.cuda_graph=true", *given], ["launch.cuda_graph=True", remedy])
        for given, remedy in (
            (["launch.compile=true"], "launch.compile=false"),
            (["launch.activation_checkpointing=true"], "launch.activation_checkpointing=false"),
            (["lora.rank=4"], "lora.rank=0"),
            (["model=wan2.1_i2v_14b"], "wan2.1_i2v_14b"),
            (["model=wan2.2_t2v_a14b", "model.expert=low", "stages=[sla]"], "wan2.2_t2v_a14b"),
        )
    ),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[" ".join(case[0]) or "nothing" for case in BAD])
def test_bad_input_names_field_value_and_remedy(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(overrides)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_composes(recipe: str) -> None:
    config = load_config([f"recipe={recipe}"])
    assert config.name == recipe
    assert (ROOT / "recipes" / f"{recipe}.md").is_file(), "each recipe has a page: hardware, cost, result"


def test_command_line_wins_over_the_recipe() -> None:
    config = load_config(["recipe=shapes", "sla.steps=7", "attention=sla_quality", "rcm.optim.lr=1e-3"])
    assert config.sla.steps == 7
    assert config.attention.topk == 0.15
    assert config.rcm.optim.lr == 1e-3
    assert config.rcm.optim.betas == [0.0, 0.999]


def test_a_usage_error_comes_fast_and_without_torch(tmp_path: Path, work_seconds: Callable[[], float]) -> None:
    script = (
        "import sys; from turbotrain.cli import train_main; "
        "code = train_main(['recipe=shapes', 'attention.topk=0']); "
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    began = work_seconds()
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert work_seconds() - began < 5
    assert done.returncode == 2
    assert done.stderr.startswith("usage: attention.topk=0")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
