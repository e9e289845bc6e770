"""docs/launch.md and docs/wan_recipes.md: every command is one that runs. Recipes and overrides compose and dry-run, launchers
know their options, batches divide by the processes; the SLURM script tells processes who they are, and queues itself again
when it should."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from recipe_world import ROOT, train_here
from torch.distributed.run import get_args_parser

from turbotrain.config import Config, load_config
from turbotrain.model.variants import VARIANTS

GUIDE = ROOT / "docs" / "launch.md"
PAGES = (GUIDE, ROOT / "docs" / "wan_recipes.md")
SCRIPT = ROOT / "tools" / "train.sbatch"
SLURM = {"SLURM_NNODES": "4", "SLURM_NODEID": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@dataclass(frozen=True)
class Command:
    """launcher: the words before train.py; overrides: those after it."""

    launcher: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def processes(self) -> int:
        if self.launcher[0] == "torchrun":
            return int(get_args_parser().parse_args([*self.launcher[1:], "train.py"]).nproc_per_node)
        if self.launcher[0] == "accelerate":
            return launch_command_parser().parse_args([*self.launcher[2:], "train.py"]).num_processes
        if self.launcher[0] == "sbatch":
            asked = dict(re.findall(r"#SBATCH --(nodes|ntasks-per-node)=(\d+)", SCRIPT.read_text()))
            return int(asked["nodes"]) * int(asked["ntasks-per-node"])
        return 1


def commands() -> list[Command]:
    """Of every fenced block, those with train.py or the SLURM script."""
    found = []
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if "train." not in line:
                continue
            for name, value in SLURM.items():
                line = line.replace(f"${name}", value).replace("$((8 * SLURM_NNODES))", "32")
            line = re.sub(r"^until (.*); do$", r"\1", line)
            words = shlex.split(line, comments=True)
            if words[:3] == ["srun", "bash", "-c"]:
                words = shlex.split(words[3])
            at = next(index for index, word in enumerate(words) if word in ("train.py", "tools/train.sbatch"))
            found.append(Command(tuple(words[:at]), tuple(words[at + 1 :])))
    return found


def test_the_guide_has_commands_of_every_kind() -> None:
    kinds = {command.launcher[0] for command in commands()}
    assert kinds == {"python", "accelerate", "torchrun", "sbatch"}
    assert len(commands()) >= 12


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command.overrides))
def test_batches_divide_and_a_pass_is_small(command: Command) -> None:
    config: Config = load_config(command.overrides)
    if config.dry_run:
        return
    if command.launcher[:2] == ("accelerate", "launch"):
        given = launch_command_parser().parse_args([*command.launcher[2:], "train.py"])
        file = ROOT / given.config_file
        assert yaml.safe_load(file.read_text())["distributed_type"] in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    shared = config.launch.context_parallel
    assert command.processes % shared == 0
    assert VARIANTS[config.model.variant].config.num_heads % shared == 0
    parts = command.processes // shared * config.launch.micro_batches
    for stage in {"sla", "rcm"} & set(config.stages):
        batch = getattr(config, stage).batch_size
        assert batch % parts == 0, f"{stage}: {batch} samples in {parts} parts"
        at_once = {"wan2.1_t2v_1.3b": 4, "shapes": 16}.get(config.model.variant, 1)
        assert batch // parts <= at_once, f"{stage}: {batch // parts} samples in a pass"


@pytest.mark.parametrize(
    "overrides", {command.overrides[0]: command.overrides for command in commands()}.values(), ids=lambda it: it[0]
)
def test_a_command_of_every_recipe_dry_runs(
    overrides: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*overrides, "dry_run=true", f"output_dir={tmp_path / 'out'}") == 0, capsys.readouterr().err
    assert "parameters" in capsys.readouterr().out


def test_files_and_keys_that_the_guide_names_exist() -> None:
    text = GUIDE.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (GUIDE.parent / link).exists(), link
    for path in re.findall(r"(?:configs|tools)/[\w./]+\.\w+", text):
        assert (ROOT / path).exists(), path
    config = load_config(["recipe=shapes"])
    for section, key in set(re.findall(r"`(launch|logging|data|lora|model|sla)\.(\w+)", text)):
        assert hasattr(getattr(config, section), key), f"{section}.{key}"


# ---- the script, with what SLURM would bring ------------------------------------------------------------------------


def run_script(folder: Path, status: int, restarts: int = 0) -> tuple[int, str, str]:
    """(exit status, what the training processes were told, what was asked of SLURM), with two tasks."""
    said = "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $SRUN_CPUS_PER_TASK"
    programs = {
        "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" || worst=$?; done; exit ${worst:-0}',
        "scontrol": f'echo "$@" >> {folder}/asked; if [ "$1" = show ]; then echo first; echo second; fi',
        "python": f'echo "{said}|$*" >> {folder}/told; exit {status}',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    told = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "6"}
    told["SLURM_RESTART_COUNT"] = str(restarts)
    environment = {**os.environ, **told, "PATH": f"{folder}:{os.environ['PATH']}", "MASTER_PORT": "29511"}
    words = ["bash", str(SCRIPT), "recipe=shapes", "stages=[data, sla]"]
    done = subprocess.run(words, env=environment, cwd=folder, check=False)
    return done.returncode, (folder / "told").read_text(), (folder / "asked").read_text()


def test_the_script_tells_every_process_who_it_is(tmp_path: Path) -> None:
    status, told, asked = run_script(tmp_path, 0)
    assert status == 0
    arguments = "train.py recipe=shapes stages=[data, sla]"
    assert told.splitlines() == [f"{rank} {rank} 2 first 29511 6|{arguments}" for rank in (0, 1)]
    assert "requeue" not in asked


@pytest.mark.parametrize(("status", "restarts", "again"), [(1, 0, True), (1, 19, True), (1, 20, False), (2, 0, False)])
def test_the_script_queues_itself_again_when_that_can_help(
    status: int, restarts: int, again: bool, tmp_path: Path
) -> None:
    found, _, asked = run_script(tmp_path, status, restarts)
    assert found == status
    assert ("requeue 7" in asked) == again
