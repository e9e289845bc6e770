"""Times training steps of a recipe with random weights on random latents, before any checkpoint or video is there.

    python tools/bench_training.py recipe=wan2.1_t2v_1.3b_480p --case sla --case scm --case "scm student=dense" --case dmd
    accelerate launch --config_file configs/accelerate/fsdp2.yaml tools/bench_training.py recipe=... --case sla

A step is the stage's own: its losses, backward passes, update and average, through `training.loop.take_step`. Samples come from
shards that are written first, of the latents' true shape, so no step runs the VAE. A case is a kind of step (sla, dcm, scm, or
dmd: scm + dmd and the critic's step in turn) and settings of its own; `student=dense` keeps dense attention in the student. Each
is warmed up, then timed step by step; what fails (memory, say) costs its own rows, and on several processes ends the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from turbotrain.compose import UsageError
from turbotrain.conditioning import MASK_CHANNELS
from turbotrain.config import NO_SHARDED_LORA, Config, load_config
from turbotrain.data.writing import Sample, write_shards
from turbotrain.evaluation.benchmark import environment, peak_rss_bytes
from turbotrain.evaluation.random_weights import CLIP_TOKENS, random_network
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import Variant
from turbotrain.model.wan import WanTransformer
from turbotrain.stages.artifacts import attention_config
from turbotrain.stages.context import StageContext
from turbotrain.stages.rcm import RcmTask
from turbotrain.stages.sla import SlaTask
from turbotrain.training.guard import Guard
from turbotrain.training.loop import Task, take_step
from turbotrain.training.meter import GIB, Meter
from turbotrain.training.parallel import choose_engine, make_accelerator
from turbotrain.training.seeding import derive_seed

PHASES = {"dcm": "{cm: dcm, dmd: false, steps: 100000}", "scm": "{cm: scm, dmd: false, steps: 100000}"}
PHASES["dmd"] = "{cm: scm, dmd: true, steps: 100000}"
KINDS = ("sla", *PHASES)
SAMPLES = 8


@dataclasses.dataclass(frozen=True)
class RandomContext(StageContext):
    """A stage whose networks are random, made on the device that trains them; of one role the same on every process."""

    def load(self, role: str) -> WanTransformer:
        attention = AttentionConfig() if role == "teacher" else attention_config(self.config)
        torch.manual_seed(derive_seed(self.config.seed, "weights"))
        network = random_network(self.variant.config, attention, None, self.device, torch.float32)
        return network.train().requires_grad_(True)


class Stopwatch:
    """Seconds that a module's forward passes take, as the device sees them."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []
        self._hooks = [
            module.register_forward_pre_hook(lambda *_: self._mark()),
            module.register_forward_hook(lambda *_: self._mark()),
        ]

    def _mark(self) -> None:
        if self.device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def read(self) -> float:
        """Of the passes since the last reading; call it when the device is done."""
        marks, self._marks = self._marks, []
        pairs = zip(marks[::2], marks[1::2])
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in pairs)
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def random_samples(variant: Variant, shape: tuple[int, int, int, int], count: int) -> Iterator[Sample]:
    """As data sets hold them: latents (C, T, H, W), text, and for image-to-video the image's."""
    config, generator = variant.config, torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    for index in range(count):
        y = draw(MASK_CHANNELS + shape[0], *shape[1:]) if config.condition_channels else None
        clip = None if config.image_dim is None else draw(CLIP_TOKENS, config.image_dim)
        yield Sample(draw(*shape), draw(config.text_len, config.text_dim), f"sample {index}", y, clip)


@contextmanager
def shards(config: Config, accelerator: Accelerator) -> Iterator[Path]:
    """A folder of random samples, which the first process writes and removes."""
    folder = [tempfile.mkdtemp(prefix="bench_training-") if accelerator.is_main_process else ""]
    broadcast_object_list(folder)
    path = Path(folder[0]) / "shards"
    try:
        if accelerator.is_main_process:
            context = RandomContext("sla", config, path, {}, accelerator)
            text = context.variant.config.text_len, context.variant.config.text_dim
            samples = random_samples(context.variant, context.latent_shape, SAMPLES)
            negative_LD = torch.randn(text, generator=torch.Generator().manual_seed(1))
            write_shards(path, samples, negative_LD, SAMPLES, {"kind": "random"})
        accelerator.wait_for_everyone()
        yield path
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder[0], ignore_errors=True)


def compose(kind: str, overrides: Sequence[str], processes: int) -> Config:
    """The configuration of a case: one sample a process (or group that shares it) and micro-batch unless the batch is given.

    Raises:
        UsageError: what the schema refuses.
    """
    stage = "sla" if kind == "sla" else "rcm"
    given = [item for item in overrides if not item.startswith("student=")]
    students = [item.removeprefix("student=") for item in overrides if item.startswith("student=")] or ["sla"]
    if students[-1] not in ("sla", "dense"):
        raise UsageError(f"student={students[-1]!r}: choose sla or dense")
    fixed = [f"stages=[{stage}]", "data.kind=shards", "model.teacher=random"]
    if kind != "sla":
        composition = "merge" if students[-1] == "dense" else "sequential"
        fixed += [f"rcm.phases=[{PHASES[kind]}]", "rcm.tangent_warmup=0", "rcm.student_update_freq=2"]
        fixed += [f"rcm.composition={composition}", "stages=[sla,rcm]"]
    # One sample a pass unless said; until that is set below, batches that the parts divide.
    parts = [item.partition("=")[2] for item in given if item.startswith("launch.micro_batches=")][-1:]
    sizes = [f"{name}.batch_size={number}" for number in parts for name in ("sla", "rcm")]
    config = load_config([*sizes, *given, *fixed])
    section = getattr(config, stage)
    if not any(item.startswith(f"{stage}.batch_size=") for item in given):
        section.batch_size = processes // config.launch.context_parallel * config.launch.micro_batches
    return config


def build(kind: str, config: Config, folder: Path, accelerator: Accelerator, engine: str) -> tuple[Task, Any]:
    """The stage's task on random networks, and its context."""
    stage = "sla" if kind == "sla" else "rcm"
    inputs = {"data": folder, "teacher": Path("random")}
    if config.rcm.composition == "sequential" and not config.lora.rank:  # adapters go on over the teacher's weights
        inputs["sla"] = Path("random")
    if config.lora.rank and engine != "ddp":
        raise ValueError(f"launch.engine={engine}: {NO_SHARDED_LORA}")
    context = RandomContext(stage, config, folder, inputs, accelerator, engine)
    return SlaTask(context) if stage == "sla" else RcmTask(context), context


@dataclasses.dataclass
class Row:
    """Steps of one kind. Seconds are medians over the steps; teacher: its forward passes, student: all the rest. Memory is of the
    process that needs most; state: what is there before the first step."""

    case: str
    kind: str
    error: str = ""
    seconds: float = math.nan
    min_s: float = math.nan
    max_s: float = math.nan
    teacher_s: float = math.nan
    student_s: float = math.nan
    steps: int = 0
    peak_gib: float = math.nan
    reserved_gib: float = math.nan
    state_gib: float = math.nan
    tokens_per_s: float = math.nan
    mfu: float = math.nan
    loss: list[float] = dataclasses.field(default_factory=list)
    grad_norm: list[float] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def time_case(
    case: str, config: Config, folder: Path, accelerator: Accelerator, engine: str, options: argparse.Namespace
) -> list[Row]:
    """Rows of one case; an error gives one row that says so."""
    kind = case.split()[0]
    try:
        return _rows(case, kind, config, folder, accelerator, engine, options)
    except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
        return [Row(case, kind, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")]
    finally:
        accelerator.free_memory()  # it remembers the networks that it wrapped
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def _rows(
    case: str,
    kind: str,
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    engine: str,
    options: argparse.Namespace,
) -> list[Row]:
    device, warmup, repeats = accelerator.device, options.warmup, options.repeats
    task, _ = build(kind, config, folder, accelerator, engine)
    teacher = Stopwatch(getattr(task, "teacher"), device)  # noqa: B009 (every stage that is timed has one)
    guard, meter = Guard(config.sla.guard), Meter(device)
    _forget_peak(device)
    state = _memory(accelerator)[0]
    kinds = ("critic", "scm+dmd") if kind == "dmd" else (kind,)
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for number in range((warmup + repeats) * len(kinds)):
        if number == warmup * len(kinds):
            _forget_peak(device)
        _finish(device)
        began = time.perf_counter()
        meter.start()
        plan = task.plan(number, number)
        step = take_step(task, plan, guard, meter, accelerator)
        _finish(device)
        seconds = time.perf_counter() - began
        if step.objection:
            raise ValueError(f"step {number} was not taken: {step.objection}")
        line = {**step.line, "seconds": seconds, "teacher_s": teacher.read(), "is_timed": number >= warmup * len(kinds)}
        line["tokens_per_s"] = plan.work.tokens / seconds
        line["mfu"] = plan.work.flops / (seconds * meter.peak * accelerator.num_processes) if meter.peak else math.nan
        lines[kinds[number % len(kinds)]].append(line)
    peak, reserved = _memory(accelerator)
    if options.profile:
        meter.start()
        table = _kernels(lambda: take_step(task, task.plan(0, 0), guard, meter, accelerator))
        if accelerator.is_main_process:
            options.profile.mkdir(parents=True, exist_ok=True)
            (options.profile / f"{'_'.join(case.replace('=', '-').split())}.txt").write_text(table)
    section = getattr(config, "sla" if kind == "sla" else "rcm")
    settings = {**vars(config.launch), "engine": engine, "optim": section.optim.kind, "batch_size": section.batch_size}
    return [_row(case, name, lines[name], settings, (state, peak, reserved)) for name in kinds]


def _row(
    case: str, kind: str, lines: list[dict[str, Any]], settings: dict[str, Any], memory: tuple[float, float, float]
) -> Row:
    timed = [line for line in lines if line["is_timed"]]
    seconds = [line["seconds"] for line in timed]

    def median(name: str) -> float:
        return statistics.median(line[name] for line in timed)

    return Row(
        case,
        kind,
        seconds=median("seconds"),
        min_s=min(seconds),
        max_s=max(seconds),
        teacher_s=median("teacher_s"),
        student_s=statistics.median(line["seconds"] - line["teacher_s"] for line in timed),
        steps=len(timed),
        state_gib=memory[0],
        peak_gib=memory[1],
        reserved_gib=memory[2],
        tokens_per_s=median("tokens_per_s"),
        mfu=median("mfu"),
        loss=[line["loss"] for line in lines],
        grad_norm=[line["grad_norm"] for line in lines],
        settings=settings,
    )


def _kernels(step: Callable[[], object]) -> str:
    """The kernels of one more step (dmd: the critic's), by the time they take."""
    activities = [ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=100)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _memory(accelerator: Accelerator) -> tuple[float, float]:
    """GiB: the largest allocation and reservation of any process so far."""
    device = accelerator.device
    if device.type == "cuda":
        mine = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
    else:
        mine = [peak_rss_bytes()] * 2
    every = accelerator.gather(torch.tensor([mine], dtype=torch.float64, device=device))
    allocated, reserved = every.amax(0).tolist()  # type: ignore[union-attr]
    return allocated / GIB, reserved / GIB


def table_of(rows: Sequence[Row]) -> Table:
    """The result for the eye."""
    table = Table(title="median seconds of a step (lowest to highest); memory of one GPU")
    for column in ("case", "step", "s", "", "teacher s", "student s", "peak GiB", "state GiB", "tokens/s", "MFU"):
        table.add_column(column, justify="left" if column in ("case", "step") else "right")
    for row in rows:
        if row.error:
            table.add_row(row.case, row.kind, f"[red]{row.error}")
            continue
        spread = f"{row.min_s:.3f}-{row.max_s:.3f}"
        times = (f"{value:.3f}" for value in (row.teacher_s, row.student_s))
        memory = (f"{value:.1f}" for value in (row.peak_gib, row.state_gib))
        rates = (f"{row.tokens_per_s:,.0f}", f"{row.mfu:.1%}")
        table.add_row(row.case, row.kind, f"{row.seconds:.3f}", spread, *times, *memory, *rates)
    return table


def about(config: Config, accelerator: Accelerator) -> dict[str, Any]:
    """What a reader needs to repeat the numbers."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    context = RandomContext("sla", config, Path(), {}, accelerator)
    return {
        "what": "training steps with random weights, on random latents from shards; the VAE is never built",
        "environment": environment(accelerator.device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": commit.stdout.strip() or os.environ.get("TURBOTRAIN_COMMIT"),
        "processes": accelerator.num_processes,
        "variant": config.model.variant,
        "latent_shape": list(context.latent_shape),
        "tokens": context.work(1).tokens,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time training steps with random weights.")
    parser.add_argument("overrides", nargs="+", help="recipe=NAME and settings for all cases, as train.py takes them")
    parser.add_argument("--case", action="append", metavar="'KIND [key=value ...]'", help=f"KIND: {', '.join(KINDS)}")
    parser.add_argument("--warmup", type=int, default=2, help="steps before timing, compilation included")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="tables of the kernels of one step of each case")
    parser.add_argument("--json", type=Path, help="written after every case")
    options = parser.parse_intermixed_args(arguments)
    options.case = options.case or list(KINDS)
    for case in options.case:
        if case.split()[0] not in KINDS:
            parser.error(f"--case {case!r}: begin with one of {', '.join(KINDS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Time, print, write. Exit status: 0; 1 if a case failed; 2 usage."""
    options = parse(arguments)
    console = Console(width=160)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        configs = [
            compose(case.split()[0], [*options.overrides, *case.split()[1:]], processes) for case in options.case
        ]
        engines = [choose_engine(config.launch, os.environ) for config in configs]
    except UsageError as error:
        console.print(f"usage: {error}", markup=False)
        return 2
    accelerator = make_accelerator(configs[0])
    report, rows = about(configs[0], accelerator), []
    with shards(configs[0], accelerator) as folder:
        for case, config, engine in zip(options.case, configs, engines):
            rows += time_case(case, config, folder, accelerator, engine, options)
            if accelerator.is_main_process and options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                report["rows"] = [dataclasses.asdict(row) for row in rows]
                options.json.write_text(json.dumps(report, indent=1))
            if rows[-1].error and accelerator.num_processes > 1:
                # The other processes may wait for this one in a collective: the launcher ends them when it is gone.
                print(rows[-1].error, file=sys.stderr, flush=True)
                os._exit(1)
    if accelerator.is_main_process:
        console.print(table_of(rows))
    accelerator.end_training()
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
