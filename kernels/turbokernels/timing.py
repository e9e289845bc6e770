"""How long calls take: medians of CUDA events, from a CUDA graph where the calls allow it (so that Python does not show); of
the wall clock on a CPU."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Call = Callable[[], object]

MIN_CALLS, MAX_CALLS = 3, 200


def measure(
    calls: Sequence[Call], seconds: float, graphed: bool, device: torch.device | None = None
) -> tuple[float, bool]:
    """Median milliseconds of one call, over about `seconds` of the device's time; and whether a graph was used.

    calls: do the same with other operands, and take turns. device: where they run; None: the current GPU.
    """
    on_gpu = device is None or device.type == "cuda"
    with torch.cuda.device(device) if device is not None and on_gpu else contextlib.nullcontext():
        for call in calls:
            call()  # compiles, and chooses launch parameters
        replay = None
        if on_gpu:
            torch.cuda.synchronize()
            replay = _graph(calls) if graphed else None
        times = _events if on_gpu else _walls
        runs = [replay] if replay else list(calls)
        per_run = len(calls) if replay else 1
        estimate = times(runs, 2)[-1]
        count = min(MAX_CALLS, max(MIN_CALLS, int(seconds * 1e3 / max(estimate, 1e-3))))
        return statistics.median(times(runs, count)) / per_run, replay is not None


def _graph(calls: Sequence[Call]) -> Call | None:
    """A replay of all calls; None for an op that cannot be captured, such as one that waits for the GPU."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay(results: object = kept) -> None:  # the graph's memory lives as long as its results
        graph.replay()

    return replay


def _events(runs: Sequence[Call], count: int) -> list[float]:
    """Milliseconds of `count` runs, in turn, without waiting in between."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for index, (start, end) in enumerate(pairs):
        start.record()
        runs[index % len(runs)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _walls(runs: Sequence[Call], count: int) -> list[float]:
    """Milliseconds of `count` runs, in turn, each done when its call returns."""
    found = []
    for index in range(count):
        start = time.perf_counter()
        runs[index % len(runs)]()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def device_name(device: torch.device) -> str:
    """The name of the hardware that a time belongs to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
