"""What `infer.py` does once its arguments are known to be sound: generate, evaluate, benchmark.

Everything above `_load` runs without torch, so that a mistake costs a second, not ten.

Frames are uint8 (T, H, W, 3).
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbotrain.checkpoint.components import COMPONENTS
from turbotrain.compose import UsageError
from turbotrain.infer_checks import load_request
from turbotrain.infer_config import InferConfig, Request, usage
from turbotrain.placement.plan import DoesNotFit, Plan
from turbotrain.sizes import video_size

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from turbotrain.model.variants import Variant
    from turbotrain.pipeline import TurboPipeline

DONE, FAILED, USAGE = 0, 1, 2
STARTED = time.perf_counter()  # of the process, but for Python's own start
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # read by torch when it first allocates


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 done, 1 failed (one line on stderr), 2 usage. `debug=true` adds the traceback."""
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print(usage())
        return DONE
    # Pieces of all sizes come and go: without this the allocator holds a fifth to a half more than is in use.
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    debug = any(argument.replace(" ", "").lower() == "debug=true" for argument in arguments)
    try:
        run(load_request(list(arguments)))
    except UsageError as error:
        return _report(error, USAGE, debug)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return FAILED
    except Exception as error:
        return _report(error, FAILED, debug)
    return DONE


def run(request: Request) -> None:
    """Loads the checkpoint and does what `mode` says."""
    if not request.config.debug:
        from turbotrain.codecs.folders import quiet_libraries

        quiet_libraries()
    if request.config.weights == "random":
        _benchmark_random(request)
        return
    picture = _read_image(request)
    plan = _plan(request, picture)
    with _explained(plan):
        pipe = _load(request.config, plan)
        if request.config.mode == "generate":
            _generate(request, pipe, picture)
        else:
            {"evaluate": _evaluate, "benchmark": _benchmark}[request.config.mode](request, pipe)


def _plan(request: Request, picture: Image.Image | None) -> Plan | None:
    """How the parts share a GPU, told in a line; None where nothing is planned."""
    from turbotrain.infer_plan import plan_run
    from turbotrain.loading import read_source, resolve_device

    config = request.config
    device = resolve_device(config.device)
    if device.type != "cuda":
        return None
    source = read_source(config.checkpoint, config.variant, _attention_kind(config))
    plan = plan_run(request, source, device, picture)
    if plan is not None:
        _say(plan.summary())
    return plan


@contextmanager
def _explained(plan: Plan | None) -> Iterator[None]:
    """Running out of GPU memory inside names the setting that would have fitted."""
    import torch

    from turbotrain.infer_plan import out_of_memory

    try:
        yield
    except torch.OutOfMemoryError as error:
        if plan is None:
            raise
        free, _ = torch.cuda.mem_get_info()
        raise DoesNotFit(out_of_memory(plan, free + torch.cuda.memory_reserved())) from error


def _attention_kind(config: InferConfig) -> str | None:
    return None if config.attention_kind == "auto" else config.attention_kind


def _read_image(request: Request) -> Image.Image | None:
    """The first frame, if there is one. Read before the weights: a damaged file should not cost their loading."""
    config = request.config
    if not config.image:
        return None
    from turbotrain.images import load_image

    picture = load_image(config.image)
    if request.variant is not None:
        own = (picture.height, picture.width)
        video_size(request.variant, config.resolution, config.aspect, config.height, config.width, own)
    return picture


def _load(config: InferConfig, plan: Plan | None) -> TurboPipeline:
    import torch

    from turbotrain.codecs.cache import default_folder
    from turbotrain.pipeline import TurboPipeline

    start = time.perf_counter()
    pipe = TurboPipeline.from_checkpoint(
        config.checkpoint,
        device=config.device,
        dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        variant=config.variant,
        components={name: value for name in COMPONENTS if (value := getattr(config, name)) is not None},
        attention_kind=_attention_kind(config),
        text_device=config.text_device,
        text_dtype=config.text_dtype,
        text_cache=default_folder() if config.text_cache and config.mode == "generate" else None,
        setting=None if plan is None else plan.setting,
    )
    if not config.cuda_graphs:
        pipe.graphs = None
    _say(f"loaded {pipe.variant.name} from {config.checkpoint} on {pipe.device} in {time.perf_counter() - start:.1f} s")
    return pipe


def _generate(request: Request, pipe: TurboPipeline, picture: Image.Image | None) -> None:
    from turbotrain.evaluation.video import VideoSink, write_video
    from turbotrain.model.variants import default_negative_prompt
    from turbotrain.pipeline import NO_NEGATIVE, UNDISTILLED

    config, jobs, targets = request.config, request.jobs, request.targets
    negative = config.negative_prompt
    if config.sampling == "turbo" and negative is not None:
        print(f"warning: {NO_NEGATIVE}", file=sys.stderr, flush=True)
        negative = None
    if config.sampling == "turbo" and pipe.meta and pipe.meta.undistilled:
        print(f"warning: {UNDISTILLED}", file=sys.stderr, flush=True)
    fps = config.fps or float(pipe.variant.fps)
    if len(jobs) > config.batch_size:  # all at once, so that the text encoder comes and goes once
        read = default_negative_prompt(pipe.variant) if negative is None else negative
        pipe.encode_prompts([*request.prompts, *([read] if config.sampling == "teacher" else [])])
    for start in range(0, len(jobs), config.batch_size):
        chunk = jobs[start : start + config.batch_size]
        names = targets[start : start + config.batch_size]

        def preview(index: int, step: int, frames_THWC: np.ndarray, names: list[Path] = names) -> None:
            name = f"{names[index].stem}-step{step}{names[index].suffix}"
            write_video(Path(config.previews).expanduser() / name, frames_THWC, fps)

        label = f"video {start + 1}" if len(chunk) == 1 else f"videos {start + 1}-{start + len(chunk)}"
        # Files grow while later frames are decoded, and batch by batch: an interruption in a long list keeps what is done.
        with _progress(label) as told, ExitStack() as stack:
            sinks = [stack.enter_context(VideoSink(name, fps)) for name in names]
            result = pipe(
                [prompt for prompt, _ in chunk],
                image=picture,
                steps=config.steps,
                seeds=[seed for _, seed in chunk],
                mode=config.sampling,
                guidance=config.guidance,
                solver=config.solver,  # type: ignore[arg-type]  # checked by infer_checks
                shift=config.shift,
                ode=config.ode,
                sigma_max=config.sigma_max,
                resolution=config.resolution,
                aspect=config.aspect,
                width=config.width,
                height=config.height,
                frames=config.frames,
                negative_prompt=negative,
                callback=told,
                preview=preview if config.previews else None,
                on_frames=lambda index, frames_THWC, sinks=sinks: sinks[index].write(frames_THWC),
            )
        for sink, (prompt, seed) in zip(sinks, chunk):
            more = f" and {len(sink.files) - 1} more" if len(sink.files) > 1 else ""
            _say(f"{sink.files[0]}{more}  seed {seed}  {_shortened(prompt)}")
        phases = "  ".join(f"{name} {result.timings[name]:.2f} s" for name in ("text", "dit", "vae"))
        _say(f"{len(chunk)} video(s): {phases}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of network steps on stderr while the block runs, if a person is watching; takes (step just done, steps in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)

        def told(done: int, total: int) -> None:
            doing = f"{what}: step" if done < total else f"{what}: decoding"
            progress.update(task, description=doing, completed=done, total=total)

        yield told


def _evaluate(request: Request, pipe: TurboPipeline) -> None:
    from turbotrain.checkpoint import load_transformer
    from turbotrain.data.shapes import sample_clips
    from turbotrain.evaluation import judge
    from turbotrain.evaluation.evaluate import Row, evaluate
    from turbotrain.evaluation.report import print_rows

    config = request.config
    if pipe.variant.vae != "shapes":
        raise UsageError(
            f"mode='evaluate': the judge reads clips of the shapes world, and this checkpoint is {pipe.variant.name}; "
            "use mode=generate or mode=benchmark"
        )
    steps = config.steps or (pipe.variant.teacher_steps if config.sampling == "teacher" else 4)
    model = "turbo" if config.sampling == "turbo" else "student"
    given = {"ode": config.ode, "sigma_max": config.sigma_max, "guidance": config.guidance, "shift": config.shift}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    rows = [Row(model, config.sampling, steps, pipe.experts, pipe.meta, settings)]
    if config.teacher:
        teacher = load_transformer(config.teacher, device=str(pipe.device))
        rows.insert(0, Row("teacher", "teacher", config.teacher_steps or pipe.variant.teacher_steps, [teacher]))
    clips = sample_clips(config.count, config.seed, split="test")
    seeds = list(range(config.seed, config.seed + config.count))
    frames, height, width = _size(request, pipe.variant)
    result = evaluate(
        pipe,
        rows,
        [clip.caption for clip in clips],
        seeds,
        judge=judge,
        batch_size=max(config.batch_size, 16),
        clips=0,
        latency_repeats=config.repeats,
        progress=_say,
        frames=frames,
        height=height,
        width=width,
    )
    print_rows(result.rows)
    _keep(config, {"rows": result.rows, "environment": result.environment})


def _benchmark(request: Request, pipe: TurboPipeline) -> None:
    from turbotrain.conditioning import Conditioning, condition_on_image
    from turbotrain.evaluation.benchmark import benchmark, print_benchmark

    config = request.config
    frames, height, width = _size(request, pipe.variant)

    def conditioning(shape: tuple[int, int, int, int]) -> Conditioning:
        return condition_on_image(pipe.variant, pipe.codec, config.image, shape, pipe.components, pipe.device)

    result = benchmark(
        pipe,
        request.prompts[0],
        conditioning=conditioning if config.image else None,
        steps=config.steps,
        mode=config.sampling,
        repeats=config.repeats,
        warmup=config.warmup,
        seed=config.seed,
        fps=config.fps,
        frames=frames,
        height=height,
        width=width,
        **_sampling(config),
    )
    print_benchmark(result)
    _keep(config, result)


def _benchmark_random(request: Request) -> None:
    import torch

    from turbotrain.evaluation.end_to_end import benchmark_random, print_random
    from turbotrain.evaluation.forward import attention_of, benchmark_forward, print_forward
    from turbotrain.infer_plan import plan_random
    from turbotrain.loading import resolve_device

    config, variant = request.config, request.variant
    assert variant is not None  # weights=random requires it
    frames, height, width = _size(request, variant)
    given: dict[str, Any] = {
        "attention_kind": "sage_sla" if config.attention_kind == "auto" else config.attention_kind,
        "scheme": {"auto": "int8_channel", "none": None}.get(config.scheme, config.scheme),
        "device": resolve_device(config.device),
        "dtype": None if config.dtype == "auto" else getattr(torch, config.dtype),
        "repeats": config.repeats,
        "warmup": config.warmup,
        "seed": config.seed,
    }
    if config.scope == "network":
        result = benchmark_forward(
            variant, variant.latent_shape(frames, height, width), batch_size=config.batch_size, **given
        )
        print_forward(result)
    else:
        attention = attention_of(variant, given["attention_kind"])
        plan = plan_random(config, variant, attention, given["scheme"], given["device"])
        if plan is not None:
            _say(plan.summary())
        result = benchmark_random(
            variant,
            plan=plan,
            cuda_graphs=config.cuda_graphs,
            text_device=config.text_device,
            text_dtype=config.text_dtype,
            started=STARTED,
            steps=config.steps,
            mode=config.sampling,
            fps=config.fps,
            frames=frames,
            height=height,
            width=width,
            **_sampling(config),
            **given,
        )
        print_random(result)
    _keep(config, result)


def _sampling(config: InferConfig) -> dict[str, Any]:
    """What a sampler is told beside its kind and steps."""
    return {"ode": config.ode, "sigma_max": config.sigma_max, "guidance": config.guidance, "shift": config.shift}


def _size(request: Request, variant: Variant) -> tuple[int, int, int]:
    """Frames, height and width of videos that start from no image."""
    config = request.config
    height, width = video_size(variant, config.resolution, config.aspect, config.height, config.width)
    return config.frames or variant.frames, height, width


def _keep(config: InferConfig, result: Any) -> None:
    """Writes the result where `json` asks for it."""
    if config.json:
        from turbotrain.evaluation.evaluate import finite
        from turbotrain.evaluation.video import write_bytes

        write_bytes(config.json, (json.dumps(finite(result), indent=2, ensure_ascii=False) + "\n").encode())
        _say(config.json)


def _say(text: str) -> None:
    """Prints, whatever the prompt holds and the terminal can show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _shortened(prompt: str) -> str:
    return textwrap.shorten("".join(c if c.isprintable() else " " for c in prompt), 120, placeholder=" ...")


def _report(error: BaseException, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    reason = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (UsageError, ValueError, OSError)):
        reason = f"{type(error).__name__}: {reason}"
    elif isinstance(error, OSError) and reason.startswith("[Errno"):
        reason = reason.partition("] ")[2]
    kind, hint = ("usage", "") if status == USAGE else ("failed", "" if debug else "  (debug=true shows the traceback)")
    print(f"{kind}: {reason}{hint}", file=sys.stderr)
    return status
