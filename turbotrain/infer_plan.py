"""How a run of `infer.py` is placed on its GPU: planned from what is free there, and explained when memory runs out after all."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from turbotrain.compose import reject
from turbotrain.infer_config import InferConfig, Request
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import Variant
from turbotrain.placement.budget import CONTEXT, Job
from turbotrain.placement.gpus import HOPPER, MEASURED, Gpu, find_gpu
from turbotrain.placement.plan import DoesNotFit, Options, Plan, choose, describe, gigabytes, memory_for, usable
from turbotrain.sizes import video_size

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from turbotrain.loading import Source

SMALLEST_TILE, TILE_UNIT = 128, 16  # pixels; 16 are a latent cell of the largest VAE
_UNITS = {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}


def memory_bytes(value: str) -> float | None:
    """`12GB`, `11.5GiB`, `6000MB` in bytes; None for `auto`.

    Raises:
        UsageError: anything else.
    """
    if value == "auto":
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)", value)
    size = float(match[1]) * _UNITS.get(match[2], 0.0) if match else 0.0
    if not size:
        reject("memory", value, "say auto, or a size such as 12GB or 11.5GiB")
    return size


def tile_pixels(value: str) -> int | None:
    """Pixels of a tile's side; 0 for `none`, None for `auto`.

    Raises:
        UsageError: no size of a tile.
    """
    if value in ("auto", "none"):
        return None if value == "auto" else 0
    if not value.isdecimal() or int(value) < SMALLEST_TILE or int(value) % TILE_UNIT:
        allowed = f"a multiple of {TILE_UNIT} from {SMALLEST_TILE} pixels on, such as 512"
        reject("vae_tiling", value, f"say auto, none, or {allowed}")
    return int(value)


def choices(config: InferConfig) -> Options:
    """What the command line leaves to the plan, for each part that it does not leave to it entirely."""
    limits: dict[str, Any] = {}
    if config.offload != "auto":
        limits["offload"] = (config.offload,)
    tile = tile_pixels(config.vae_tiling)
    if tile is not None:
        limits["vae_tile"] = (tile or None,)
    if config.text_device != "auto":
        limits["text"] = ("stay", "visit") if config.text_device == "cuda" else (config.text_device,)
    if not config.cuda_graphs:
        limits["graphs"] = (False,)
    return limits


def job_of(config: InferConfig, source: Source, videos: int, picture: Image | None = None) -> Job:
    """What is to be computed, for the largest batch of the run."""
    variant: Variant = source.variant
    own = None if picture is None else (picture.height, picture.width)
    height, width = video_size(variant, config.resolution, config.aspect, config.height, config.width, own)
    attention = AttentionConfig.from_dict(source.meta.attention)
    if source.attention_kind is not None:
        attention = replace(attention, kind=source.attention_kind)
    quantization = source.meta.quantization if config.dtype == "auto" else None
    return Job(
        replace(variant, config=source.config),
        config.frames or variant.frames,
        height,
        width,
        attention,
        scheme=(quantization or {}).get("scheme"),
        **_sampler_calls(config, variant),
        batch=min(config.batch_size, max(1, videos)),
        image=picture is not None,
        text_int8=config.text_dtype == "int8",
    )


def _sampler_calls(config: InferConfig, variant: Variant) -> dict[str, Any]:
    is_teacher = config.sampling == "teacher"
    steps = config.steps or (variant.teacher_steps if is_teacher else 4)
    return {"steps": steps, "guided": is_teacher and config.guidance != 1}


def plan_run(request: Request, source: Source, device: torch.device, picture: Image | None = None) -> Plan | None:
    """The placement of a run on a GPU; None on a CPU, and for networks in float32, which nothing is known of.

    A `memory` that is given becomes the limit of what torch allocates.

    Raises:
        DoesNotFit: nothing fits, with what would.
    """
    config = request.config
    if device.type != "cuda" or config.dtype == "float32":
        return None
    return _plan_job(config, job_of(config, source, len(request.jobs), picture), device)


def plan_random(
    config: InferConfig, variant: Variant, attention: AttentionConfig, scheme: str | None, device: torch.device
) -> Plan | None:
    """As `plan_run`, for one video of a network with random weights."""
    if device.type != "cuda" or config.dtype == "float32":
        return None
    height, width = video_size(variant, config.resolution, config.aspect, config.height, config.width)
    job = Job(
        variant,
        config.frames or variant.frames,
        height,
        width,
        attention,
        scheme,
        **_sampler_calls(config, variant),
        image=variant.config.model_type != "t2v",
        text_int8=config.text_dtype == "int8",
    )
    return _plan_job(config, job, device)


def _plan_job(config: InferConfig, job: Job, device: torch.device) -> Plan:
    import psutil
    import torch

    free, total = torch.cuda.mem_get_info(device)
    given = memory_bytes(config.memory)
    if given is not None:
        free = min(free, given - CONTEXT)
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, free / total)), index)
    gpu = gpu_of(torch.cuda.get_device_name(device), total)
    host = psutil.virtual_memory().available
    job = replace(job, conv_kernel=gpu.capability[0] == HOPPER)
    plan = choose(job, usable(free), gpu, limits=choices(config), host_memory=host)
    return replace(plan, is_limited=given is not None)


def gpu_of(name: str, memory: float) -> Gpu:
    """The GPU of that name; one that nobody has listed is taken for as fast as the measured one."""
    try:
        return find_gpu(name)
    except ValueError:
        return replace(MEASURED, name=name, memory=memory)


def out_of_memory(plan: Plan, there: float) -> str:
    """What to say when a run that was planned needs more than the GPU has: the setting that would have fitted.

    there: bytes that torch had, used or not.
    """
    had = (
        f"out of GPU memory: {describe(plan.setting)} was to take {gigabytes(plan.peak)}, {gigabytes(there)} were there"
    )
    target = min(usable(there), 0.95 * plan.peak)
    try:
        other = choose(plan.job, target, plan.gpu)
    except DoesNotFit as refusal:
        return f"{had}; {refusal}"
    return f"{had}; memory={memory_for(target)} would have chosen {describe(other.setting)}, which takes {gigabytes(other.peak)}"
