"""The schema of infer.py: defaults in one place only, free text taken as typed, no torch."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import write_checkpoint

from turbotrain.compose import UsageError, compose, configs_folder
from turbotrain.infer_checks import load_request, probe_writable
from turbotrain.infer_config import InferConfig, prepare

ROOT = Path(__file__).resolve().parents[2]


def test_the_yaml_and_the_dataclass_agree() -> None:
    assert asdict(compose("infer", [], InferConfig)) == asdict(InferConfig())


def test_no_key_is_the_name_of_a_config_group() -> None:
    """Hydra would read `key=value` as the choice of a group."""
    groups = {path.name for path in configs_folder().iterdir() if path.is_dir()}
    assert not groups & set(asdict(InferConfig()))


@pytest.mark.parametrize(
    "text",
    [
        "a cat, sitting: (on) a [mat] {here}",
        'it\'s "quoted"',
        "${now:} and ${oc.env:HOME}",
        "ends in a backslash \\",
        "back\\slash \\' quote",
        "a=b=c",
        "null",
        "3",
        "true",
        "émoji 🐈 猫",
        "key: value, [1,2], {a: b}",
        "'",
        "\\\\'",
        "\\${x} \\\\${y}",
    ],
)
def test_prompts_are_taken_as_typed(text: str) -> None:
    assert compose("infer", [prepare(f"prompt={text}")], InferConfig).prompt == text


def test_one_seed_is_a_list_of_one() -> None:
    assert compose("infer", [prepare("seeds=3")], InferConfig).seeds == [3]
    assert compose("infer", [prepare("seeds=[3,4]")], InferConfig).seeds == [3, 4]


def test_checking_imports_nothing_heavy(checkpoint: Path) -> None:
    code = (
        "import sys; from turbotrain.infer_checks import load_request; "
        f"load_request(['checkpoint={checkpoint}', 'prompt=x']); "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'av', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_defaults_of_the_checkpoint_are_known_before_torch(checkpoint: Path) -> None:
    request = load_request([f"checkpoint={checkpoint}", "prompt=x"])
    assert request.variant is not None
    assert request.variant.name == "shapes"
    assert request.prompts == ["x"]


def test_teacher_sampling_takes_more_steps(checkpoint: Path) -> None:
    good = [f"checkpoint={checkpoint}", "prompt=x", "sampling=teacher"]
    assert load_request([*good, "steps=50", "guidance=3"]).config.guidance == 3
    with pytest.raises(UsageError, match="steps=1001: 1 to 1000"):
        load_request([*good, "steps=1001"])
    with pytest.raises(UsageError, match="ode=True: is for sampling=turbo"):
        load_request([*good, "ode=true"])


def test_attention_in_8_bits_is_for_checkpoints_with_sla(checkpoint: Path, tmp_path: Path) -> None:
    assert load_request([f"checkpoint={checkpoint}", "prompt=x", "attention_kind=sage_sla"]).config
    with pytest.raises(UsageError, match="attention_kind='dense': is for weights=random"):
        load_request([f"checkpoint={checkpoint}", "prompt=x", "attention_kind=dense"])
    dense = write_checkpoint(tmp_path / "dense", "dense")
    with pytest.raises(UsageError, match="attention_kind='sage_sla': the checkpoint was trained with dense attention"):
        load_request([f"checkpoint={dense}", "prompt=x", "attention_kind=sage_sla"])


RANDOM = ["mode=benchmark", "weights=random", "variant=shapes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights=random", "variant=shapes"], "weights='random': is for mode=benchmark, and this is mode=generate"),
        (["mode=benchmark", "weights=random"], "variant: missing; weights=random needs one of wan2.1_t2v_1.3b"),
        ([*RANDOM, "prompt=x"], "prompt='x': weights=random reads nothing; leave it out"),
        ([*RANDOM, "scheme=int4"], "scheme='int4': choose one of auto, none, int8_channel"),
        ([*RANDOM, "attention_kind=linear"], "attention_kind='linear': choose one of auto, dense, sla, sage_sla"),
        ([*RANDOM, "frames=12"], "frames=12: shapes needs 4 n"),
        (["prompt=x", "scheme=int8_channel"], "scheme='int8_channel': is for weights=random"),
        (["prompt=x", "weights=none"], "weights='none': choose one of checkpoint, random"),
    ],
)
def test_random_weights_are_for_a_clock(arguments: list[str], message: str) -> None:
    assert load_request(RANDOM).variant
    with pytest.raises(UsageError, match=message):
        load_request(arguments)


def test_a_full_disk_is_noticed_before_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, dir: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(
        OSError, match=r"output='.*a.mp4': cannot write in .*: No space left on device; choose another output"
    ):
        probe_writable("output", tmp_path / "new" / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        probe_writable("output", tmp_path / "a.mp4")
