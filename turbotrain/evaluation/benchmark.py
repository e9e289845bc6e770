"""Where the time of one video goes: text, DiT steps, VAE, encoding; medians of repeats after warm-up, and peak memory.

The file is written while frames are decoded: `encode` is what is left to do when the last has come.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from turbokernels.timing import device_name

from turbotrain.conditioning import Conditioning
from turbotrain.evaluation.video import VideoSink
from turbotrain.pipeline import TurboPipeline

PHASES = ("text", "image", "dit_step", "dit", "vae", "encode", "total")


def benchmark(
    pipe: TurboPipeline,
    prompt: str,
    *,
    steps: int | None = None,
    mode: str = "turbo",
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    fps: float | None = None,
    conditioning: Callable[[tuple[int, int, int, int]], Conditioning] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Times one video, alone in its batch, phase by phase.

    Args:
        conditioning: makes what an image-to-video network sees of its image, for latents (C, T, H, W); timed as `image`.
        sampling: `frames`, `height`, `width` and other arguments of `TurboPipeline.sample`.
        progress: called with (repeats done, repeats in all).

    Returns:
        {"phases": {name: {"median_s", "min_s", "max_s"}}, "first_video_s" (which compiles, and is no repeat), "settings",
        "peak_memory_bytes", "peak_memory_of", "environment"}; on a GPU also "peak_reserved_bytes", which counts what the
        allocator holds for later.
    """
    size = {name: sampling.pop(name, None) for name in ("frames", "height", "width")}
    shape = pipe.latent_shape(size["frames"], size["height"], size["width"])
    samples: dict[str, list[float]] = {name: [] for name in PHASES if name != "image" or conditioning is not None}
    first_video_s = 0.0
    on_cuda = pipe.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for repeat in range(warmup + repeats):
            marks = [_now(pipe)]
            step_marks = [marks[0]]
            context_BLD = pipe.prompts.encode([prompt])  # the pipeline itself would remember it
            negative_BLD = pipe.encode_prompts([""]) if mode == "teacher" else None
            marks.append(_now(pipe))
            image = None if conditioning is None else conditioning(shape)
            marks.append(_now(pipe))
            step_marks[0] = marks[-1]
            latents_BCTHW = pipe.sample(
                context_BLD,
                [seed],
                shape,
                mode=mode,
                steps=steps,
                negative_BLD=negative_BLD,
                conditioning=image,
                callback=lambda _done, _total, at=step_marks: at.append(_now(pipe)),
                **sampling,
            )
            marks.append(_now(pipe))
            with VideoSink(Path(folder) / "video.mp4", fps or pipe.variant.fps) as sink:
                frames_THWC = pipe.decode(latents_BCTHW, lambda _, frames_THWC, sink=sink: sink.write(frames_THWC))[0]
                marks.append(_now(pipe))
            marks.append(_now(pipe))
            if repeat == 0:
                first_video_s = marks[-1] - marks[0]
            if repeat >= warmup:
                for name, start, end in zip(("text", "image", "dit", "vae", "encode"), marks, marks[1:]):
                    if name in samples:
                        samples[name].append(end - start)
                samples["dit_step"] += [end - start for start, end in pairwise(step_marks)]
                samples["total"].append(marks[-1] - marks[0])
            if progress is not None:
                progress(repeat + 1, warmup + repeats)
    return {
        "phases": {
            name: {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}
            for name, values in samples.items()
        },
        "first_video_s": first_video_s,
        "settings": {
            "variant": pipe.variant.name,
            "mode": mode,
            "steps": len(step_marks) - 1,
            "latent_shape": list(shape),
            "video_shape": list(frames_THWC.shape),
            "repeats": repeats,
            "warmup": warmup,
        },
        "peak_memory_bytes": torch.cuda.max_memory_allocated(pipe.device) if on_cuda else peak_rss_bytes(),
        "peak_memory_of": "tensors on the GPU" if on_cuda else "the whole process, loading included",
        **({"peak_reserved_bytes": torch.cuda.max_memory_reserved(pipe.device)} if on_cuda else {}),
        "environment": environment(pipe.device),
    }


def print_benchmark(result: dict[str, Any], console: Console | None = None) -> None:
    """The result of `benchmark` as a table."""
    settings = result["settings"]
    shape = "x".join(str(size) for size in settings["video_shape"][:3])
    table = Table(title=f"{settings['variant']}, {settings['mode']}, {settings['steps']} steps, {shape}")
    table.add_column("phase")
    for name in ("median", "min", "max"):
        table.add_column(name, justify="right")
    for phase, row in result["phases"].items():
        table.add_row(phase.replace("_", " "), *(seconds(row[f"{name}_s"]) for name in ("median", "min", "max")))
    console = console or Console()
    console.print(table)
    console.print(f"peak memory of {result['peak_memory_of']}: {result['peak_memory_bytes'] / 2**20:,.0f} MiB")
    console.print(f"first video of this process: {seconds(result['first_video_s'])}")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a number depends on besides the code: device, threads, versions."""
    device = torch.device(device)
    found: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
    for package in ("turbotrain", "torch", "triton", "diffusers", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_rss_bytes() -> int:
    """The largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def seconds(value: float) -> str:
    """As tables show a time."""
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def _now(pipe: TurboPipeline) -> float:
    pipe.synchronize()
    return time.perf_counter()
