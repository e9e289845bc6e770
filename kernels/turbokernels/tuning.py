"""Launch parameters of Triton kernels: which tile sizes, warps and stages an op runs with on this GPU.

`best` asks, in this order, and remembers the answer for the process:
1. the table that ships for this GPU, `tables/<gpu>.json`: measured ahead of time;
2. the user's cache, `$XDG_CACHE_HOME/turbokernels/triton-<version>/<gpu>.json` (`~/.cache` by default), filled by 3;
3. with TURBOKERNELS_AUTOTUNE=1, a timed search over the op's candidates (about 0.1 s each, plus compilation);
4. the op's first candidate, which its author orders by expectation.
Keys hold no lengths, so a search decides on the operands of the first call: let that be one of the size that matters.
`without_search` keeps small operands, such as a check's, from deciding.
Table and cache have one format, so that a cache file tuned on a GPU can be shipped as its table:
{"gpu": name, "entries": {op: {key: {"num_warps": .., "num_stages": .., "blocks": {..}}}}}.
An entry counts only while it is one of the candidates. A choice that this GPU cannot launch is an error that names the
remedy, never a silent change of tiles.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch._guards import detect_fake_mode

logger = logging.getLogger(__name__)

AUTOTUNE_VARIABLE = "TURBOKERNELS_AUTOTUNE"
MAX_CANDIDATES = 8  # a search is bounded
SEARCH_ROUNDS = 4
GLUON_VERSIONS = ((3, 6), (3, 7))
TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True, init=False)
class Launch:
    """What a kernel is launched with besides its operands: Launch(num_warps=8, num_stages=3, BLOCK_Q=128, BLOCK_K=64).

    blocks: the kernel's own compile-time integers, sorted by name (hashable).
    """

    num_warps: int
    num_stages: int
    blocks: tuple[tuple[str, int], ...]

    def __init__(self, num_warps: int, num_stages: int, **blocks: int) -> None:
        object.__setattr__(self, "num_warps", num_warps)
        object.__setattr__(self, "num_stages", num_stages)
        object.__setattr__(self, "blocks", tuple(sorted(blocks.items())))

    def __getitem__(self, name: str) -> int:
        """The block size called `name`, for grids and padding."""
        return dict(self.blocks)[name]

    def __contains__(self, name: str) -> bool:
        """Whether there is a block called `name`."""
        return any(name == known for known, _ in self.blocks)

    def kwargs(self, **constants: Any) -> dict[str, Any]:
        """Keyword arguments of the launch, with its other compile-time constants: kernel[grid](..., **launch.kwargs())."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **dict(self.blocks), **constants}

    def to_json(self) -> dict[str, Any]:
        """The entry of a table."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "blocks": dict(self.blocks)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Launch:
        """Inverse of `to_json`. Errors: KeyError or TypeError when the entry is not one."""
        return cls(entry["num_warps"], entry["num_stages"], **entry["blocks"])


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on any device (TRITON_INTERPRET=1 before its first import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, for an op's list of candidates; (9, 0) where kernels are interpreted on another device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def has_gluon() -> bool:
    """Whether this Triton's Gluon is one that kernels are written for: it changes between versions, and is compiled only."""
    import triton  # here, so that the library imports without it

    return not interpreted() and tuple(map(int, triton.__version__.split(".")[:2])) in GLUON_VERSIONS


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; an H200's 227 KiB where kernels are interpreted."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def best(
    op: str, key: tuple, candidates: Sequence[Launch], run: Callable[[Launch], object], device: torch.device
) -> Launch:
    """Return the launch parameters that `op` uses for `key` on `device` (see the module's docstring for the order).

    key: what the choice depends on (head dim, dtype, block sizes, ...), never a length: few keys, so that videos of
    different lengths share one binary. candidates: 1 to 8, best guess first, all of which compute the same. run: launches
    the kernel once with given parameters on the real operands; it may be called several times and must not read what
    it writes. Under the interpreter: candidates[0], and run is not called.
    Errors: RuntimeError when the chosen parameters (in a search: all) need more shared memory or registers than the
    GPU has.
    """
    if not 1 <= len(candidates) <= MAX_CANDIDATES:
        raise ValueError(f"{op}: {len(candidates)} launch candidates; pass 1 to {MAX_CANDIDATES}")
    if interpreted() or device.type != "cuda":
        return candidates[0]
    gpu = torch.cuda.get_device_name(device)
    name = key_name(key)
    found = _chosen.get((gpu, op, name))
    if found is not None and found in candidates:
        return found
    launch, source = _known(gpu, op, name, candidates), "table or cache"
    # While a graph is traced or captured the operands are not real, or nothing may be timed: choose, but remember
    # nothing, so that the first eager call still searches.
    if _is_tracing() or not _may_search:
        return launch or candidates[0]
    if launch is None and os.environ.get(AUTOTUNE_VARIABLE, "0") == "1":
        launch, source = _search(op, name, candidates, run, device), "search"
        _write_cache(gpu, op, name, launch)
    elif launch is None:
        launch, source = candidates[0], "first candidate"
        _try(op, name, launch, run, device)
    else:
        _try(op, name, launch, run, device)
    logger.debug("turbokernels: %s %s on %s: %s (%s)", op, name, gpu, launch, source)
    _chosen[gpu, op, name] = launch
    return launch


_chosen: dict[tuple[str, str, str], Launch] = {}  # one entry per GPU model, op and key: answers of this process


_may_search = True  # of the process: backward passes run in threads of their own


@contextlib.contextmanager
def without_search() -> Iterator[None]:
    """Calls within take what is known, else the first candidate, and leave the choice open for calls outside."""
    global _may_search
    before, _may_search = _may_search, False
    try:
        yield
    finally:
        _may_search = before


def choices() -> dict[tuple[str, str, str], Launch]:
    """What this process runs with: (GPU, op, key) -> launch parameters."""
    return dict(_chosen)


def key_name(key: tuple) -> str:
    """A key as tables write it: its parts, comma-separated; dtypes without their module."""
    return ",".join(str(part).removeprefix("torch.") for part in key)


def table_name(gpu: str) -> str:
    """File name of a GPU's table: "NVIDIA H200" -> "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def cache_file(gpu: str) -> Path:
    """Where searches on this GPU model are remembered; one folder per Triton version, whose code differs in speed."""
    import triton  # here, so that the library imports without it

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "turbokernels" / f"triton-{triton.__version__}" / table_name(gpu)


def _is_tracing() -> bool:
    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return True
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Entries of a table or cache file, op -> key -> entry; none if there is no file. A damaged cache is no reason to
    stop: it says so and counts as empty."""
    try:
        return json.loads(path.read_text())["entries"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("turbokernels: %s is not a tuning table (%s) and is ignored; delete it", path, error)
        return {}


def _known(gpu: str, op: str, name: str, candidates: Sequence[Launch]) -> Launch | None:
    """The entry of the shipped table, else of the cache, if it is still a candidate."""
    for path in (TABLES / table_name(gpu), cache_file(gpu)):
        entry = _read(path).get(op, {}).get(name)
        if entry is None:
            continue
        try:
            launch = Launch.from_json(entry)
        except (KeyError, TypeError):
            launch = None
        if launch in candidates:
            return launch
        logger.warning("turbokernels: %s: %s lists %s for %s, which is not a candidate any more", op, path, entry, name)
    return None


def _write_cache(gpu: str, op: str, name: str, launch: Launch) -> None:
    """Add an entry. The file is replaced as a whole, so a reader never sees half of one; a folder that cannot be
    written costs the next process its search, and a line in the log."""
    path = cache_file(gpu)
    _read.cache_clear()  # another process may have added entries
    entries = {known: dict(keys) for known, keys in _read(path).items()}
    entries.setdefault(op, {})[name] = launch.to_json()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"gpu": gpu, "entries": entries}, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("turbokernels: the tuning of %s could not be kept in %s: %s", op, path, error)
    _read.cache_clear()


def _try(op: str, name: str, launch: Launch, run: Callable[[Launch], object], device: torch.device) -> None:
    """Launch once. What the GPU cannot hold fails here, before anything relies on the choice."""
    from triton.runtime.errors import OutOfResources

    try:
        run(launch)
    except OutOfResources as error:
        raise RuntimeError(
            f"{op} ({name}): {launch} does not fit {torch.cuda.get_device_name(device)} ({error}): set "
            f"{AUTOTUNE_VARIABLE}=1 once, which searches for one that does, or use impl='reference'"
        ) from error


def _search(
    op: str, name: str, candidates: Sequence[Launch], run: Callable[[Launch], object], device: torch.device
) -> Launch:
    """The candidate with the lowest time; those that the GPU cannot hold are left out.

    All are compiled before any is timed, and then take turns: a GPU that has idled while the CPU compiled runs slowly at
    first, by more than candidates differ. Of each one's medians the best counts.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    fitting: list[Launch] = []
    for launch in candidates:
        try:
            run(launch)
            fitting.append(launch)
        except OutOfResources as error:
            logger.info("turbokernels: %s: %s does not fit: %s", op, launch, error)
    milliseconds: dict[Launch, float] = {}
    for launch in fitting * SEARCH_ROUNDS:
        median = cast(float, do_bench(functools.partial(run, launch), warmup=5, rep=20, return_mode="median"))
        milliseconds[launch] = min(median, milliseconds.get(launch, median))
    if not milliseconds:
        raise RuntimeError(
            f"{op} ({name}): none of {len(candidates)} launch candidates fits {torch.cuda.get_device_name(device)} "
            f"({shared_memory(device)} bytes of shared memory per program): use impl='reference'"
        )
    winner = min(milliseconds, key=milliseconds.__getitem__)
    logger.info("turbokernels: %s %s: %s at %.4f ms", op, name, winner, milliseconds[winner])
    return winner
