"""torch.profiler over a few steps of the first process, when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator


class Steps(Protocol):
    def step(self) -> None: ...


class _NoProfiler:
    def step(self) -> None: ...


@contextmanager
def profiled(folder: Path, steps: Sequence[int], accelerator: Accelerator) -> Iterator[Steps]:
    """Trace steps `steps[0]` to `steps[1] - 1` of this launch into `folder/trace.json` (for Perfetto or chrome://tracing), after
    a step that warms the profiler up; nothing where `steps` is empty."""
    if not steps or not accelerator.is_main_process:
        yield _NoProfiler()
        return
    first, last = steps
    activities = [torch.profiler.ProfilerActivity.CPU]
    if accelerator.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def write(profiler: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))

    warmup = min(1, first)
    plan = torch.profiler.schedule(wait=first - warmup, warmup=warmup, active=last - first, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=plan, on_trace_ready=write, profile_memory=True
    ) as profiler:
        yield profiler
