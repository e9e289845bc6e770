"""Prompt to mp4 with random weights at the true sizes, and beside it, in the same run, what the dense teacher takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console

from turbotrain.evaluation.benchmark import benchmark, print_benchmark, seconds
from turbotrain.evaluation.forward import TEACHER_CALLS, attention_of, benchmark_forward, default_dtype, print_forward
from turbotrain.evaluation.random_weights import random_image_conditioning, random_pipeline
from turbotrain.model.variants import Variant
from turbotrain.placement.plan import Plan

PROMPT = "two cats in boxing gloves fight on a lit stage while a crowd in the dark cheers, slow motion, close up"


@torch.inference_mode()
def benchmark_random(
    variant: Variant,
    *,
    attention_kind: str = "sage_sla",
    scheme: str | None = "int8_channel",
    device: torch.device,
    dtype: torch.dtype | None = None,
    cuda_graphs: bool = True,
    text_device: str = "auto",
    text_dtype: str = "auto",
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    started: float | None = None,
    plan: Plan | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Times one video of a pipeline with random weights phase by phase, then one step of the dense teachers.

    Args:
        attention_kind, scheme: of the Turbo networks, as `benchmark_forward` takes them.
        plan: how the parts share the device; one that leaves less than all of it to them is measured without the teachers.
        started: `time.perf_counter()` when the process began to work, for the time to its first video; None: now.
        settings: further arguments of `benchmark`: `steps`, `mode`, `frames`, `height`, `width`, `fps`, ...

    Returns:
        What `benchmark` returns, with "cold_start_s" (from `started` to the first mp4, weights made instead of read), "forward"
        (what `benchmark_forward` returns) and "teacher_over_dit": {teacher: TEACHER_CALLS of its steps / the `dit`
        phase}; with a plan its predictions, as "plan".
    """
    started = time.perf_counter() if started is None else started
    dtype = dtype or default_dtype(device)
    torch.manual_seed(seed)
    pipe = random_pipeline(
        variant,
        attention_of(variant, attention_kind),
        scheme,
        device,
        dtype,
        text_device=text_device,
        text_dtype=text_dtype,
        setting=None if plan is None else plan.setting,
    )
    if not cuda_graphs:
        pipe.graphs = None
    making_s = time.perf_counter() - started
    conditioning: Callable[..., Any] | None = None
    if variant.config.model_type != "t2v":
        conditioning = partial(random_image_conditioning, pipe)
    result = benchmark(pipe, PROMPT, repeats=repeats, warmup=warmup, seed=seed, conditioning=conditioning, **settings)
    if pipe.graphs is not None:
        pipe.graphs.clear()
    result["cold_start_s"] = making_s + result["first_video_s"]
    if plan is not None:
        result["plan"] = plan.to_dict()
        if plan.setting.offload != "none" or plan.is_limited:
            return result
    result["forward"] = benchmark_forward(
        variant,
        tuple(result["settings"]["latent_shape"]),
        attention_kind=attention_kind,
        scheme=scheme,
        network=pipe.experts[-1],  # type: ignore[arg-type]  # a WanTransformer, by random_pipeline
        device=device,
        dtype=dtype,
        repeats=repeats,
        warmup=warmup,
        seed=seed,
    )
    rows, dit_s = result["forward"]["rows"], result["phases"]["dit"]["median_s"]
    result["teacher_over_dit"] = {
        name: TEACHER_CALLS * rows[name]["median_s"] / dit_s for name in result["forward"]["teachers"]
    }
    return result


def print_random(result: dict[str, Any], console: Console | None = None) -> None:
    """The result of `benchmark_random` as tables and sentences."""
    console = console or Console()
    print_benchmark(result, console)
    console.print(
        f"from the process' start to its first mp4, weights made and not read: {seconds(result['cold_start_s'])}"
    )
    if "plan" in result:
        console.print(
            f"planned: {result['plan']['peak_bytes'] / 2**20:,.0f} MiB, {seconds(result['plan']['seconds']['total'])}"
        )
    if "forward" not in result:
        return
    print_forward(result["forward"], console)
    rows, dit_s = result["forward"]["rows"], result["phases"]["dit"]["median_s"]
    for name, ratio in result["teacher_over_dit"].items():
        calls = f"{TEACHER_CALLS} steps of {name} take {TEACHER_CALLS * rows[name]['median_s']:.1f} s"
        console.print(f"{calls}: {ratio:.0f} times the {seconds(dit_s)} of all DiT steps above")
