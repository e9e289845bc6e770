"""What a run remembers of its stages: `stage.json`, its fingerprint, and how a changed one is recognised."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from turbotrain.checkpoint.atomic import new_file
from turbotrain.config import Config

# Settings that change how a stage runs but not what it produces: changing them makes nothing stale.
NOT_IN_FINGERPRINT = {"save_every", "sample_every", "max_bad_steps", "guard", "fused", "latency_repeats"}
HASHED_WHOLE = 256 * 2**20
STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class Plan:
    """What will be done with one stage. action: run | skip | resume | stale; reason: what changed, for stale."""

    stage: str
    action: str
    reason: str = ""


def plan_stage(stage: str, folder: Path, fingerprint: dict[str, Any]) -> Plan:
    """Compare a stage's folder with what it should hold."""
    record = read_record(folder)
    if record is None:
        return Plan(stage, "run")
    changed = _changes(record.get("fingerprint", {}), fingerprint)
    if changed:
        return Plan(stage, "stale", "; ".join(changed))
    return Plan(stage, "skip" if record["status"] == "done" else "resume")


def make_fingerprint(config: Config, sections: Sequence[str], inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Flat {setting: value} and {input/role: hash}: everything that shapes the stage's result."""
    settings: dict[str, Any] = {"seed": config.seed, "model.variant": config.model.variant}
    # Only where they are used: runs without them are as they were.
    used = {"model.expert": config.model.expert, "data.first_frame": config.data.first_frame}
    if {"sla", "rcm"} & set(sections):
        used["model.teacher_scheme"] = config.model.teacher_scheme
    settings.update({name: value for name, value in used.items() if value})
    for section in sections:
        if section == "lora" and not config.lora.rank:
            continue
        settings.update(flatten(getattr(config, section), section))
    if not config.sla.layer_budget:
        settings.pop("sla.layer_budget", None)
    if not config.quantize.finetune.steps:
        settings = {name: value for name, value in settings.items() if not name.startswith("quantize.finetune.")}
    for role, path in inputs.items():
        settings[f"input/{role}"] = hash_path(path) if path.exists() else "missing"
    return settings


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting below `value` that shapes results."""
    if is_dataclass(value) and not isinstance(value, type):
        for name, inner in vars(value).items():
            if name not in NOT_IN_FINGERPRINT:
                yield from flatten(inner, f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list) and any(is_dataclass(item) for item in value):
        yield prefix, [asdict(item) for item in value]
    else:
        yield prefix, value


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changed = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            changed.append(
                f"{key.removeprefix('input/')} changed" if key.startswith("input/") else f"{key}: {old} -> {new}"
            )
    return changed


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files by name; of a very large file: its length and three blocks."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(str(file.relative_to(path) if path.is_dir() else file.name).encode())
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            if size <= HASHED_WHOLE:
                while block := stream.read(1 << 22):
                    digest.update(block)
            else:
                for position in (0, size // 2, size - (1 << 24)):
                    stream.seek(position)
                    digest.update(stream.read(1 << 24))
    return digest.hexdigest()


def begin(folder: Path, fingerprint: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = read_record(folder) or {"started": _now(), "seconds": 0.0}
    write_json(folder / STAGE_FILE, {**record, "status": "running", "fingerprint": fingerprint, "attempted": _now()})


def finish(folder: Path, results: dict[str, object], seconds: float) -> None:
    record = read_record(folder) or {}
    record.update(
        status="done",
        finished=_now(),
        seconds=round(seconds, 3),
        peak_memory_bytes=_peak_memory(),
        results=results,
        environment=environment(),
    )
    write_json(folder / STAGE_FILE, record)
    shutil.rmtree(folder / "state", ignore_errors=True)


def read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / STAGE_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def status(folder: Path) -> str:
    record = read_record(folder)
    return record["status"] if record else "absent"


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the new one. Raises OSError as `new_file` does."""
    with new_file(path) as new:
        new.write_text(json.dumps(value, indent=2) + "\n")


def set_aside(folder: Path) -> None:
    number = 1
    while (target := folder.with_name(f"{folder.name}.stale-{number}")).exists():
        number += 1
    folder.rename(target)
    print(f"{folder.name}: the earlier result is kept in {target}", flush=True)


def environment() -> dict[str, str]:
    """What a result depends on besides its inputs: versions, machine kind, commit."""
    import torch

    names = ("turbotrain", "torch", "triton", "accelerate", "diffusers", "transformers")
    found = {"python": platform.python_version(), "commit": _commit()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"
    return found


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _peak_memory() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
