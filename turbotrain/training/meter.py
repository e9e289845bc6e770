"""How fast a step was: tokens, arithmetic, memory, waiting for data, and whether one process keeps the others waiting."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

# Dense bf16 tensor-core peak in FLOP/s, from the vendors' data sheets, by what torch calls the device.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
GIB = 2**30


@dataclass(frozen=True)
class Work:
    """What a step has to do, over all processes. tokens: video tokens trained on. flops: multiplications and additions that the
    method needs, without those that only activation checkpointing repeats."""

    tokens: int = 0
    flops: float = 0.0


class Meter:
    """Times one step of this process: `start`, `before_last_backward`, `own_times`, `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._process = psutil.Process()

    def start(self) -> None:
        self._began = time.perf_counter()
        if self._events:
            self._events[0].record()

    def before_last_backward(self) -> None:
        """Up to here a process under DDP waits for no other, but for those that it shares samples with."""
        self._alone = time.perf_counter() - self._began
        if self._events:
            self._events[1].record()

    def own_times(self) -> dict[str, float]:
        """Seconds of this process alone; what the gathering of all is given."""
        alone = self._alone
        if self._events:
            self._events[1].synchronize()
            alone = self._events[0].elapsed_time(self._events[1]) / 1e3
        return {"alone": alone}

    def stop(self, times: Mapping[str, list[float]], work: Work) -> dict[str, float]:
        """What metrics.jsonl says of the step. straggle_seconds: the slowest process after the fastest, before they meet."""
        seconds = time.perf_counter() - self._began
        said = {"seconds": seconds, "memory_gib": self._memory() / GIB}
        if len(times["alone"]) > 1:
            slowest = max(range(len(times["alone"])), key=times["alone"].__getitem__)
            said |= {"straggle_seconds": times["alone"][slowest] - min(times["alone"]), "slowest_rank": float(slowest)}
        if work.tokens:
            said["tokens_per_s"] = work.tokens / seconds
        if work.flops and self.peak:
            said["mfu"] = work.flops / (seconds * self.peak * len(times["alone"]))
        return said

    def _memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self._events else self._process.memory_info().rss
