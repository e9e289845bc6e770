"""`python infer.py ...` as a user runs it: results, exit status, one line of reason, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from turbotrain.evaluation.video import read_video
from turbotrain.inference import main

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "prompt=a small red circle moves left slowly on a black background"
QUICK = 5.0  # seconds within which a mistake is answered, on an idle machine; measured 0.6 to 1.2


def infer(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "infer.py"), *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file_in_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        done = infer(f"checkpoint={checkpoint}", PROMPT, "seed=7", f"output={name}.webp", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"{name}.webp" in done.stdout
        digests.append(hashlib.sha256((tmp_path / f"{name}.webp").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.webp", "b.webp"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands that load torch run in this process, to spare its start."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prompts_from_a_file_in_batches(checkpoint: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "prompts.txt").write_text("a red circle, large\n\nblue: 'square' ${now:}\n", encoding="utf-8")
    arguments = ["prompts=prompts.txt", "seeds=[1,2]", "steps=1", "batch_size=3", "output=o/v.mp4"]
    assert main([f"checkpoint={checkpoint}", *arguments]) == 0
    names = sorted(path.name for path in (here / "o").iterdir())
    assert names == ["v-00-seed1.mp4", "v-01-seed2.mp4", "v-02-seed1.mp4", "v-03-seed2.mp4"]
    frames_THWC, fps = read_video(here / "o" / names[0])
    assert frames_THWC.shape == (13, 64, 64, 3)
    assert fps == 8
    assert "blue: 'square' ${now:}" in capfd.readouterr().out


def test_benchmark_reports_every_phase(checkpoint: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["mode=benchmark", "steps=2", "repeats=2", "warmup=0", "json=b.json"]
    assert main([f"checkpoint={checkpoint}", PROMPT, *arguments]) == 0
    result = json.loads((here / "b.json").read_text())
    assert set(result["phases"]) == {"text", "dit_step", "dit", "vae", "encode", "total"}
    assert all(row["min_s"] <= row["median_s"] <= row["max_s"] for row in result["phases"].values())
    assert result["phases"]["dit"]["median_s"] < result["phases"]["total"]["median_s"]
    assert result["peak_memory_bytes"] > 1e8
    assert "dit step" in capfd.readouterr().out


def test_evaluate_judges_the_student_beside_its_teacher(
    checkpoint: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "mode=evaluate",
        "count=3",
        "steps=1",
        f"teacher={checkpoint}",
        "teacher_steps=2",
        "repeats=1",
        "json=e.json",
    ]
    assert main([f"checkpoint={checkpoint}", *arguments]) == 0
    teacher, student = json.loads((here / "e.json").read_text())["rows"]
    assert (teacher["model"], teacher["sampler"], teacher["steps"]) == ("teacher", "teacher", 2)
    assert (student["model"], student["sampler"], student["steps"]) == ("turbo", "turbo", 1)
    assert 0 <= student["accuracy"] <= 1
    assert set(student["attributes"]) == {"background", "shape", "colour", "size", "direction", "speed"}
    assert student["psnr"] > 0
    assert "accuracy" in capfd.readouterr().out


def test_a_failure_inside_is_one_line_and_debug_shows_where(
    checkpoint: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"checkpoint={checkpoint}", PROMPT, f"vae={here}", "steps=1"]
    assert main(arguments) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "no readable AutoencoderKLWan folder" in said
    assert main([*arguments, "debug=true"]) == 1
    assert "Traceback" in capfd.readouterr().err


class Bomb:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple:
        return (os.system, ("touch exploded",))


def bad_inputs(checkpoint: Path, tmp_path: Path) -> dict[str, tuple[int, list[str], str]]:
    """name: (exit status, arguments, what the line on stderr says)."""
    weights = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    good = f"checkpoint={checkpoint}"
    return {
        "steps 0": (2, [good, PROMPT, "steps=0"], "steps=0: the Turbo sampler takes 1 to 4"),
        "steps 5": (
            2,
            [good, PROMPT, "steps=5"],
            "steps=5: the Turbo sampler takes 1 to 4; sampling=teacher takes more",
        ),
        "not a number": (
            2,
            [good, PROMPT, "steps=many"],
            "steps=many: Value 'many' of type 'str' could not be converted",
        ),
        "frames": (2, [good, PROMPT, "frames=12"], "frames=12: shapes needs 4 n + 1 frames; nearest are 9 and 13"),
        "width": (2, [good, PROMPT, "width=60"], "width=60: shapes needs a multiple of 8; nearest are 56 and 64"),
        "empty prompt": (2, [good, "prompt= "], "prompt=' ': empty; say what the video shows"),
        "no prompt": (2, [good], "prompt='': empty"),
        "empty file": (2, [good, "prompts=blank.txt"], "prompts='blank.txt': the file holds no prompt"),
        "no such file": (2, [good, "prompts=gone.txt"], "prompts='gone.txt': No such file or directory"),
        "unknown key": (2, [good, PROMPT, "stepz=3"], "stepz: unknown key (value '3'); did you mean steps"),
        "new key": (2, [good, PROMPT, "+stepz=3"], "stepz: unknown key"),
        "no value": (2, [good, PROMPT, "steps"], "argument 'steps' is not of the form key=value"),
        "mode": (2, [good, PROMPT, "mode=dream"], "mode='dream': choose one of generate, evaluate, benchmark"),
        "seed": (2, [good, PROMPT, "seed=-1"], "seed=-1: 0 to 2^63 - 1"),
        "guidance": (2, [good, PROMPT, "guidance=3"], "guidance=3.0: is for sampling=teacher"),
        "sigma_max": (2, [good, PROMPT, "sigma_max=9"], "sigma_max=9.0: must be above 14.1"),
        "image": (
            2,
            [good, PROMPT, "image=a.png"],
            "image='a.png': image input needs an i2v variant; this checkpoint is shapes",
        ),
        "suffix": (2, [good, PROMPT, "output=a.avi"], "output='a.avi': the suffix says the format; use one of .mp4"),
        "other variant": (1, [good, PROMPT, "variant=wan2.1_t2v_1.3b"], "wan2.1_t2v_1.3b"),
        "device": (2, [good, PROMPT, "device=tpu"], "device='tpu': choose auto, cpu, cuda or cuda:N"),
        "no checkpoint": (2, [PROMPT], "checkpoint: missing; say checkpoint=PATH"),
        "missing": (1, ["checkpoint=gone", PROMPT], "checkpoint: gone does not exist"),
        "truncated": (1, ["checkpoint=cut", PROMPT], "truncated"),
        "not a checkpoint": (1, ["checkpoint=empty", PROMPT], "checkpoint: empty: no .safetensors"),
        "code in a pickle": (1, ["checkpoint=bomb.pth", PROMPT], "refused, because loading this pickle would run"),
        "read-only": (1, [good, PROMPT, "output=/proc/self/a.mp4"], "output='/proc/self/a.mp4': cannot write in"),
    }


def test_bad_input_is_answered_at_once(checkpoint: Path, tmp_path: Path, work_seconds: Callable[[], float]) -> None:
    """One process each, as users meet it: status, one line that names field, value and remedy, no file left, in time."""
    cases = bad_inputs(checkpoint, tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for name, (status, arguments, message) in cases.items():
        start = work_seconds()
        done = infer(*arguments, cwd=tmp_path)
        seconds = work_seconds() - start
        assert done.returncode == status, (name, done.stderr)
        assert message in done.stderr, (name, done.stderr)
        assert done.stderr.count("\n") == 1, (name, done.stderr)
        assert done.stdout == "", name
        assert seconds < QUICK, name
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_cuda_device_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    from turbotrain.infer_checks import _cuda_devices

    if _cuda_devices() != 0:
        pytest.skip("this machine shows a CUDA device")
    done = infer(f"checkpoint={checkpoint}", PROMPT, "device=cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert "device='cuda': this machine shows no CUDA device; use device=cpu or device=auto" in done.stderr


def test_help_lists_every_key(tmp_path: Path) -> None:
    done = infer("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(f"  {key} " in done.stdout for key in ("checkpoint", "prompt", "steps", "seeds", "sampling", "device"))
