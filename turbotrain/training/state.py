"""The state of an interrupted stage: networks, optimisers, averages and counters, written so that a kill loses nothing.

A state is a folder `step_00000050/` of safetensors files and one JSON; it is written beside its final name and renamed when
it is complete, so whatever bears the final name can be read. Randomness is derived from the step (`seeding.py`), so nothing
else is needed to continue bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbotrain.training.parallel import Role

PREFIX = "step_"


def save_state(folder: Path, step: int, roles: Mapping[str, Role], extra: Mapping[str, Tensor], keep: int) -> None:
    """Write the state after `step` updates of the loop, then drop all but the newest `keep`.

    Raises:
        OSError: it could not be written; the states before it are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".tmp-*"):  # of a process that was killed: only one writes here
        shutil.rmtree(torn, ignore_errors=True)
    final = folder / f"{PREFIX}{step:08d}"
    partial = folder / f".tmp-{final.name}-{os.getpid()}"
    partial.mkdir()
    try:
        counters = {"step": step, "updates": {name: role.updates for name, role in roles.items()}}
        for name, role in roles.items():
            _write(partial / f"{name}.safetensors", role.network.state_dict())
            _write(partial / f"{name}.optimizer.safetensors", _optimizer_tensors(role))
        _write(partial / "extra.safetensors", extra)
        (partial / "state.json").write_text(json.dumps(counters))
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{final}: the training state could not be written ({error}); free some space, then the same command continues"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in saved_steps(folder)[:-keep]:
        shutil.rmtree(folder / f"{PREFIX}{old:08d}", ignore_errors=True)


def load_state(folder: Path, roles: Mapping[str, Role], device: torch.device) -> tuple[int, dict[str, Tensor]]:
    """Restore the newest state; returns the step to continue from (0 if there is none) and the extra tensors."""
    steps = saved_steps(folder)
    if not steps:
        return 0, {}
    newest = folder / f"{PREFIX}{steps[-1]:08d}"
    counters = json.loads((newest / "state.json").read_text())
    for name, role in roles.items():
        role.network.load_state_dict(load_file(newest / f"{name}.safetensors", device=str(device)), strict=True)
        _restore_optimizer(role, load_file(newest / f"{name}.optimizer.safetensors", device=str(device)))
        role.updates = counters["updates"][name]
    return counters["step"], load_file(newest / "extra.safetensors", device=str(device))


def saved_steps(folder: Path) -> list[int]:
    """The steps with a complete state, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name.removeprefix(PREFIX)) for path in folder.iterdir() if path.name.startswith(PREFIX))


def _optimizer_tensors(role: Role) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in role.named_parameters():
        for key, value in role.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    return tensors


def _restore_optimizer(role: Role, tensors: Mapping[str, Tensor]) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = value
    for name, parameter in role.named_parameters():
        if name in by_name:
            state = by_name[name]
            # A plain AdamW keeps its step count on the CPU, a fused one on the parameter's device.
            fused = bool(role.optimizer.param_groups[0].get("fused"))
            state["step"] = state["step"] if fused else state["step"].cpu()
            role.optimizer.state[parameter] = state


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def _sync(folder: Path) -> None:
    """Force the files to disk before the rename makes them the newest state."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
