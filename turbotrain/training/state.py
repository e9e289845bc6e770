"""The state of an interrupted stage, written while training goes on and so that a kill at any moment loses nothing.

A state is a folder `step_00000050/`: one safetensors file a process with the pieces that it holds (`pieces.py`), and one
JSON. Every process copies its pieces to the host and writes them in a thread, into a folder of another name; when the last
file is on disk the first process gives it the final name. So whatever bears the final name can be read. Randomness is
derived from the step (`seeding.py`), so nothing else is needed to continue bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from turbotrain.checkpoint.atomic import UNFINISHED, clear_unfinished, sync
from turbotrain.training.pieces import Piece, SavedPieces, write_pieces

PREFIX = "step_"
STATE_FILE = "state.json"
POLL_S = 0.005


class StateWriter:
    """Writes states of one stage in the background; one at a time. Every process has its own and calls it at the same steps.

    keep: how many states stay, besides the one that the newest calls the best (`best.py`). Wants the folder on a file system
    that all processes share.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.rank == 0:
            clear_unfinished(folder)
        # Names of this launch's half-written folders: a killed launch's files are never mistaken for these.
        token = [uuid.uuid4().hex[:12]]
        if self.world > 1:
            dist.broadcast_object_list(token, device=_object_device())
        self.token = token[0]
        self._failed = folder / f"{UNFINISHED}failed-{self.token}"
        self._host: dict[str, Tensor] = {}
        self._closing = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, pieces: Iterable[Piece], counters: Mapping[str, Any]) -> None:
        """Copy the pieces to the host, then write them while the caller goes on.

        Raises:
            OSError: the state before this one could not be written.
        """
        self.wait()
        mine = [self._snapshot(piece) for piece in pieces if self.rank == 0 or not piece.replicated]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        description = {"step": step, "world": self.world, **counters}
        self._thread = threading.Thread(target=self._write, args=(step, mine, description), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last state bears its name.

        Raises:
            OSError: it could not be written; the states before it are as they were.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """End the writing, for a caller that failed: what only other processes are missing from is given up."""
        self._closing = True
        if self._thread is not None:
            self._thread.join()

    def _snapshot(self, piece: Piece) -> Piece:
        flat = piece.flat
        host = self._host.get(piece.name)
        if host is None or host.numel() != flat.numel():
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
            self._host[piece.name] = host
        host.copy_(flat, non_blocking=True)
        return dataclasses.replace(piece, tensor=host)

    def _write(self, step: int, pieces: list[Piece], description: dict[str, Any]) -> None:
        final = _place(self.folder, step)
        partial = self.folder / f"{UNFINISHED}{final.name}-{self.token}"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            path = partial / f"rank_{self.rank:05d}.safetensors"
            write_pieces(path, pieces)
            sync(path)
            (partial / f"done_{self.rank:05d}").touch()
            if self.rank == 0:
                self._await_others(partial)
                self._publish(partial, final, description)
        except BaseException as error:  # whatever it is, the thread that trains has to raise it
            self._error = error
            if isinstance(error, (OSError, SafetensorError)):
                self._error = OSError(
                    f"{final}: the training state could not be written ({error}); free some space, then the same command "
                    "continues"
                )
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    self._failed.touch()

    def _await_others(self, partial: Path) -> None:
        """Files tell of the other processes: no collective may run beside those of training."""
        waiting = [partial / f"done_{rank:05d}" for rank in range(self.world)]
        while waiting := [path for path in waiting if not path.exists()]:
            if self._failed.exists() or self._closing:
                raise OSError("another process did not write its part")
            time.sleep(POLL_S)

    def _publish(self, partial: Path, final: Path, description: dict[str, Any]) -> None:
        for done in partial.glob("done_*"):
            done.unlink()
        description["files"] = {path.name: path.stat().st_size for path in sorted(partial.glob("rank_*"))}
        (partial / STATE_FILE).write_text(json.dumps(description))
        sync(partial / STATE_FILE)
        sync(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        sync(self.folder)
        # A damaged state that this run passed over may be of a later step: it must not take a good one's place.
        whole = [step for step in saved_steps(self.folder) if _is_whole(_place(self.folder, step))]
        kept = {*whole[-self.keep :], description.get("best", {}).get("step")}
        for old in saved_steps(self.folder):
            if old not in kept:
                shutil.rmtree(_place(self.folder, old), ignore_errors=True)


def read_state(folder: Path, pieces: Iterable[Piece]) -> dict[str, Any] | None:
    """Fill the pieces from the newest state; returns what its JSON says, None if there is none.

    Raises:
        ValueError: the state is of another network or recipe.
    """
    newest = newest_state(folder)
    if newest is None:
        return None
    description = _description(newest)
    with SavedPieces([newest / name for name in description["files"]]) as saved, torch.no_grad():
        saved.fill(pieces)
    return description


def newest_state(folder: Path) -> Path | None:
    """The newest state whose files are all there and of the size that was written (a disk may lose what it promised)."""
    for step in reversed(saved_steps(folder)):
        path = _place(folder, step)
        if _is_whole(path):
            return path
        print(f"{path}: damaged, passed over", flush=True)
    return None


def _is_whole(state: Path) -> bool:
    try:
        files = _description(state)["files"]
        return all((state / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def saved_tensors(folder: Path, prefix: str, step: int | None = None) -> dict[str, Tensor]:
    """The whole tensors under `prefix` in the newest state, or in that of `step`, on the CPU: how a sharded network becomes a
    checkpoint.

    Raises:
        OSError: no state, or one that is damaged.
    """
    state = newest_state(folder) if step is None else _place(folder, step)
    if state is None:
        raise FileNotFoundError(f"{folder}: no training state to take {prefix} from")
    try:
        with SavedPieces([state / name for name in _description(state)["files"]]) as saved:
            return saved.whole(prefix)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise OSError(f"{state}: damaged ({error})") from error


def best_state(folder: Path) -> dict[str, Any]:
    """What the newest state says of the best: {"metric", "step", "value"} and how it was found, or {}."""
    newest = newest_state(folder)
    said = {} if newest is None else _description(newest).get("best", {})
    return said if "step" in said else {}


def saved_steps(folder: Path) -> list[int]:
    """The steps with a state, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name.removeprefix(PREFIX)) for path in folder.iterdir() if path.name.startswith(PREFIX))


def _place(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:08d}"


def _description(state: Path) -> dict[str, Any]:
    return json.loads((state / STATE_FILE).read_text())


def _object_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
