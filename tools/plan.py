"""Says what a run takes and how it fits: `python tools/plan.py wan2.1_t2v_14b --resolution 720p --gpu "RTX 4090"`.

MODEL is a variant or a checkpoint; without one, every variant is planned. `infer.py` makes the same plan as it starts. Times for
another GPU than the measured one are computed from datasheets. Exit status: 0 fits, 1 does not (with what would), 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from command import DONE, FAILED, Parser, run
from rich.console import Console
from rich.table import Table

from turbotrain.infer_config import SAMPLINGS, SCHEMES
from turbotrain.infer_plan import gpu_of, memory_bytes, tile_pixels
from turbotrain.model.attention_config import KINDS, AttentionConfig
from turbotrain.model.variants import VARIANTS, Variant, WanConfig
from turbotrain.placement.budget import Job
from turbotrain.placement.gpus import GPUS, HOPPER, MEASURED, Gpu, find_gpu
from turbotrain.placement.plan import (
    CHOICES,
    DoesNotFit,
    Options,
    Plan,
    available_of,
    choose,
    describe,
    gigabytes,
    seconds,
)
from turbotrain.sizes import RESOLUTIONS, video_size

ELSEWHERE = ("RTX 3060", "RTX 4070 Ti SUPER", "RTX 4090", "RTX 5090", "L40S", "A100 80GB", "H200")
FASTEST = AttentionConfig("sage_sla", block_q=128, block_k=64)


@dataclass(frozen=True)
class Model:
    """What is planned: a variant, with what its checkpoint says where there is one."""

    variant: Variant
    attention: AttentionConfig | None = None
    scheme: str | None = None
    is_checkpoint: bool = False


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Predict memory and time of a run, and choose how it is placed on a GPU.")
    parser.add_argument("model", nargs="?", help="a variant, or a checkpoint (default: every variant)")
    parser.add_argument("--resolution", help="480p, 580p, 720p, or WIDTHxHEIGHT (default: the variant's own)")
    parser.add_argument("--aspect", help="W:H")
    parser.add_argument("--frames", type=int, help="4n + 1 (default: the variant's own)")
    parser.add_argument("--sampling", choices=SAMPLINGS, default="turbo")
    parser.add_argument("--steps", type=int, help="of the sampler (default: 4, or the teacher's)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--image", action="store_true", help="a ti2v network starts from an image (i2v ones always do)")
    parser.add_argument("--weights", choices=SCHEMES, default="auto", help="8-bit scheme; none: bfloat16")
    parser.add_argument("--attention", choices=("auto", *KINDS), default="auto")
    parser.add_argument(
        "--gpu", action="append", help="a name such as 'RTX 4090'; may be repeated (default: this machine's)"
    )
    parser.add_argument("--memory", default="auto", help="of the GPU, such as 12GB (default: all of it)")
    parser.add_argument("--host-memory", default="auto", help="for weights that leave the GPU (default: enough)")
    parser.add_argument("--offload", choices=("auto", *CHOICES["offload"]), default="auto")
    parser.add_argument("--vae-tiling", default="auto", help="auto, none, or pixels of a tile's side")
    parser.add_argument("--text-device", choices=("auto", *CHOICES["text"]), default="auto")
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    for name, value in (("--batch-size", options.batch_size), ("--steps", options.steps), ("--frames", options.frames)):
        if value is not None and value < 1:
            parser.error(f"{name} {value}: must be at least 1")
    try:
        options.bytes, options.host = memory_bytes(options.memory), memory_bytes(options.host_memory)
        options.tile = tile_pixels(options.vae_tiling)
        options.gpus = [find_gpu(name) for name in options.gpu or ()]
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_plan, parse(arguments))


def _plan(options: argparse.Namespace) -> int:
    models = [_model(options.model)] if options.model else [Model(variant) for variant in _published()]
    gpus = options.gpus or _here(options)
    found = [(model, gpu, _best(options, model, gpu)) for model in models for gpu in gpus]
    if options.json:
        print(json.dumps([_as_dict(*entry) for entry in found], indent=1))
    elif len(found) == 1:
        _print_one(*found[0])
    else:
        _print_many(found)
    return DONE if any(isinstance(plan, Plan) for *_, plan in found) else FAILED


def _published() -> list[Variant]:
    return [variant for variant in VARIANTS.values() if variant.vae != "shapes"]


def _model(name: str) -> Model:
    """Raises ValueError for what is neither a variant nor a checkpoint."""
    if name in VARIANTS:
        return Model(VARIANTS[name])
    if not Path(name).expanduser().exists():
        raise ValueError(f"model={name!r}: neither a checkpoint nor a variant ({', '.join(VARIANTS)})")
    from turbotrain.loading import read_source  # imports torch

    source = read_source(name)
    scheme = (source.meta.quantization or {}).get("scheme")
    variant = replace(source.variant, config=WanConfig.from_dict(source.meta.config))
    return Model(variant, AttentionConfig.from_dict(source.meta.attention), scheme, True)


def _here(options: argparse.Namespace) -> list[Gpu]:
    """This machine's GPU, or a choice of them."""
    if options.bytes is not None:
        return [replace(MEASURED, name=f"a GPU with {gigabytes(options.bytes)}", memory=options.bytes)]
    import torch

    if torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        return [gpu_of(torch.cuda.get_device_name(), total)]
    return [GPUS[name] for name in ELSEWHERE]


def _best(options: argparse.Namespace, model: Model, gpu: Gpu) -> Plan | DoesNotFit:
    """The fastest of the plans with the weights that may be used; a teacher's are not quantised while they fit."""
    available = available_of(gpu.memory if options.bytes is None else min(options.bytes, gpu.memory))
    plans: list[Plan] = []
    refusal: DoesNotFit | None = None
    for scheme in _schemes(options, model):
        try:
            plans.append(
                choose(
                    _job(options, model, scheme, gpu), available, gpu, limits=_limits(options), host_memory=options.host
                )
            )
        except DoesNotFit as error:
            refusal = refusal or error
        if plans and options.sampling == "teacher":
            break
    if plans:
        return min(plans, key=lambda plan: plan.durations.total)
    assert refusal is not None  # there is at least one scheme
    return refusal


def _schemes(options: argparse.Namespace, model: Model) -> list[str | None]:
    if options.weights != "auto":
        return [None if options.weights == "none" else options.weights]
    if model.is_checkpoint:
        return [model.scheme]
    return [None, "int8_channel"] if options.sampling == "teacher" else ["int8_channel", None]


def _job(options: argparse.Namespace, model: Model, scheme: str | None, gpu: Gpu) -> Job:
    variant, is_teacher = model.variant, options.sampling == "teacher"
    width, by, height = (options.resolution or "").partition("x")
    named = None if by else options.resolution
    if by and not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--resolution {options.resolution}: say {', '.join(RESOLUTIONS)} or WIDTHxHEIGHT")
    size = (int(height), int(width)) if by else (None, None)
    attention = model.attention or (AttentionConfig() if is_teacher else FASTEST)
    if options.attention != "auto":
        attention = AttentionConfig.from_dict({"kind": options.attention}, attention)
    job = Job(
        variant,
        options.frames or variant.frames,
        *video_size(variant, named, options.aspect, *size),
        attention,
        scheme,
        steps=options.steps or (variant.teacher_steps if is_teacher else 4),
        guided=is_teacher,
        batch=options.batch_size,
        conv_kernel=gpu.capability[0] == HOPPER,
        image=options.image or variant.config.model_type == "i2v",
    )
    _ = job.latent_shape  # raises for frames and sizes that the variant does not have
    return job


def _limits(options: argparse.Namespace) -> Options:
    limits: dict[str, Any] = {}
    if options.offload != "auto":
        limits["offload"] = (options.offload,)
    if options.text_device != "auto":
        limits["text"] = (options.text_device,)
    if options.tile is not None:
        limits["vae_tile"] = (options.tile or None,)
    return limits


def _as_dict(model: Model, gpu: Gpu, plan: Plan | DoesNotFit) -> dict[str, Any]:
    entry = {"model": model.variant.name, "gpu": gpu.name, "fits": isinstance(plan, Plan)}
    return {**entry, **(plan.to_dict() if isinstance(plan, Plan) else {"reason": str(plan)})}


def _print_one(model: Model, gpu: Gpu, plan: Plan | DoesNotFit) -> None:
    console = Console()
    if isinstance(plan, DoesNotFit):
        print(f"failed: {plan}", file=sys.stderr)
        return
    job, taken = plan.job, plan.durations
    kinds = f"{job.scheme or 'bfloat16'}, {job.attention.kind}, {job.steps} steps{', guided' if job.guided else ''}"
    table = Table(title=f"{model.variant.name} {job.width}x{job.height}x{job.frames} on {gpu.name}: {kinds}")
    table.add_column("phase")
    for name in ("weights", "work", "peak", "time"):
        table.add_column(name, justify="right")
    times = {"text": taken.text, "dit": taken.dit, "vae": taken.vae}
    for name, phase in plan.phases.items():
        amounts = (gigabytes(amount) for amount in (phase.weights, phase.work, phase.total))
        table.add_row(name, *amounts, seconds(times[name]) if name in times else "")
    console.print(table)
    for line in _lines(plan, gpu):
        console.print(line, highlight=False, soft_wrap=True)


def _lines(plan: Plan, gpu: Gpu) -> Iterator[str]:
    taken = plan.durations
    yield f"peak {gigabytes(plan.peak)} of {gigabytes(plan.available)} that may be used; host memory {gigabytes(plan.host)}"
    waiting = f", of which {seconds(taken.copies)} waiting for weights" if taken.copies else ""
    as_measured = replace(gpu, name=MEASURED.name, memory=MEASURED.memory) == MEASURED
    origin = f"at the rates of an {MEASURED.name}" if as_measured else "computed from datasheets"
    yield f"about {seconds(taken.total)} ({seconds(taken.step)} a step{waiting}); {origin}"
    yield f"infer.py: {describe(plan.setting)}"
    yield from (f"  {reason}" for reason in plan.reasons)


def _print_many(found: Sequence[tuple[Model, Gpu, Plan | DoesNotFit]]) -> None:
    table = Table()
    for name in ("model", "GPU", "weights", "peak", "time", "placement"):
        table.add_column(name, justify="right" if name in ("peak", "time") else "left", overflow="fold")
    for model, gpu, plan in found:
        if isinstance(plan, DoesNotFit):
            table.add_row(model.variant.name, gpu.name, "", "", "", f"does not fit: {str(plan).partition('; ')[2]}")
            continue
        weights, took = plan.job.scheme or "bfloat16", seconds(plan.durations.total)
        table.add_row(model.variant.name, gpu.name, weights, gigabytes(plan.peak), took, describe(plan.setting))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
