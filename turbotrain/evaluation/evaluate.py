"""Which fraction of the teacher survives: every row samples the same prompts with the same seeds and is judged alike.

Text is encoded once, sampling and decoding are batched, latency is measured apart on single warm videos. Numbers come with 95%
bootstrap intervals over prompts; ratios to the teacher are bootstrapped in pairs, because both sides saw the same prompts.

Shapes: frames uint8 (T, H, W, 3); latents (B, C, T, H, W).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from turbotrain.checkpoint import CheckpointMeta
from turbotrain.evaluation.benchmark import environment
from turbotrain.evaluation.metrics import bootstrap_interval, gap_closed, jackknife_interval, psnr, ssim
from turbotrain.evaluation.video import webp_bytes, write_bytes
from turbotrain.pipeline import TurboPipeline

# Captions are shifted by so many prompts for the chance level; the teacher's, which stands in the charts, is averaged.
SHUFFLES, REFERENCE_SHUFFLES = (1,), (1, 2, 3)
BASELINES = ("sla", "teacher")  # whose Turbo-sampled rows are "undistilled"


class Judge(Protocol):
    """How clips are read: `turbotrain.evaluation.judge` for the shapes world."""

    def judge(self, frames_THWC: np.ndarray, caption: str) -> Any: ...

    def coverage(self, judgements: list[Any]) -> float: ...


@dataclass
class Row:
    """One line of the quality table.

    Attributes:
        model: teacher | sla | rcm | turbo (contract 8). sampler: teacher | turbo. steps: network steps.
        networks: one network, or (high, low); None: those of the pipeline.
        meta: the checkpoint's metadata; its sampler settings are used.
        settings: further arguments of `TurboPipeline.sample` (guidance, solver, grid, shift, ode, sigma_max).
    """

    model: str
    sampler: str
    steps: int
    networks: Sequence[nn.Module] | None = None
    meta: CheckpointMeta | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name for folders and for finding the row again."""
        return f"{self.model}-{self.sampler}-{self.steps}"


@dataclass
class Evaluation:
    """What `evaluate` returns: `rows` and `environment` as report.json has them, and clips of the first prompts by row key."""

    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    prompts: list[str]
    seeds: list[int]
    clips: dict[str, list[np.ndarray]]
    fps: float

    def save(self, folder: str | Path) -> Path:
        """Writes report.json and clips/<row>/<prompt>.webp, each file whole or not at all; returns the report's path."""
        folder = Path(folder)
        files: dict[str, list[str]] = {}
        for key, clips in self.clips.items():
            for index, frames_THWC in enumerate(clips):
                target = folder / "clips" / key / f"{index:02d}.webp"
                write_bytes(target, webp_bytes(frames_THWC, self.fps))
                files.setdefault(key, []).append(str(target.relative_to(folder)))
        shown = max((len(clips) for clips in self.clips.values()), default=0)
        document = {
            "rows": self.rows,
            "environment": self.environment,
            "prompts": len(self.prompts),
            "clips": {"prompts": self.prompts[:shown], "seeds": self.seeds[:shown], "fps": self.fps, "files": files},
        }
        text = json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return write_bytes(folder / "report.json", text.encode())


def evaluate(
    pipe: TurboPipeline,
    rows: Sequence[Row],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    judge: Judge | None = None,
    batch_size: int = 16,
    clips: int = 6,
    latency_repeats: int = 5,
    negative_prompt: str = "",
    progress: Callable[[str], None] | None = None,
    **size: int | None,
) -> Evaluation:
    """Samples and judges every row on the same prompts and seeds.

    The first row with model `teacher` and the teacher sampler is the reference for PSNR, SSIM and ratios.

    Args:
        pipe: gives codec, text encoder, variant and device; rows bring the networks.
        judge: reads attributes from clips; None for worlds without one (accuracy and coverage are then null).
        clips: prompts whose videos are kept to be looked at.
        latency_repeats: timed single videos a row, after one warm-up.
        negative_prompt: of the teacher sampler.
        progress: told one line a finished row.
        size: frames, height, width.

    Raises:
        ValueError: no rows, two rows of one key, or not one seed a prompt.
    """
    _check(rows, prompts, seeds)
    shape = pipe.latent_shape(size.get("frames"), size.get("height"), size.get("width"))
    with torch.inference_mode():
        context_BLD = pipe.encode_prompts(list(prompts))
        negative_1LD = pipe.encode_prompts([negative_prompt])
    reference = next((row for row in rows if row.model == "teacher" and row.sampler == "teacher"), None)
    # The reference goes first, because the others are compared with its videos.
    order = sorted(range(len(rows)), key=lambda index: rows[index] is not reference)
    results: dict[int, dict[str, Any]] = {}
    kept: dict[str, list[np.ndarray]] = {}
    reference_videos: list[np.ndarray] = []
    scores: dict[str, list[float]] = {}
    for index in order:
        row = rows[index]
        began = time.perf_counter()
        model = pipe.with_networks(row.networks, row.meta) if row.networks is not None else pipe
        sampler = {"mode": row.sampler, "steps": row.steps, **row.settings}

        def sample(at: slice, model: TurboPipeline = model, sampler: dict[str, Any] = sampler) -> list[np.ndarray]:
            chosen = list(seeds[at])
            negative = negative_1LD.expand(len(chosen), -1, -1) if sampler["mode"] == "teacher" else None
            return model.decode(model.sample(context_BLD[at], chosen, shape, negative_BLD=negative, **sampler))

        videos: list[np.ndarray] = []
        with torch.inference_mode():
            for start in range(0, len(prompts), batch_size):
                videos += sample(slice(start, start + batch_size))
            latency = _latency(pipe, lambda: sample(slice(0, 1)), latency_repeats)
        result: dict[str, Any] = {"model": row.model, "sampler": row.sampler, "steps": row.steps, "key": row.key}
        result["quantization"] = (row.meta.quantization or {}).get("scheme") if row.meta else None
        result["attention"] = dict(row.meta.attention) if row.meta else None
        shuffles = REFERENCE_SHUFFLES if row is reference else SHUFFLES
        result.update(_judged(judge, videos, prompts, shuffles, scores.setdefault(row.key, [])))
        if row is reference:
            reference_videos = videos
        elif reference_videos:
            result.update(_fidelity(videos, reference_videos))
        result["latency_s"] = latency
        results[index] = result
        kept[row.key] = videos[:clips]
        if progress is not None:
            progress(_line(result, time.perf_counter() - began))
    ordered = [results[index] for index in range(len(rows))]
    _compare(ordered, scores, reference.key if reference else None)
    fps = float(pipe.variant.fps)
    shown = {row.key: kept[row.key] for row in rows}
    return Evaluation(ordered, environment(pipe.device), list(prompts), list(seeds), shown, fps)


def _check(rows: Sequence[Row], prompts: Sequence[str], seeds: Sequence[int]) -> None:
    keys = [row.key for row in rows]
    if not rows or len(set(keys)) != len(keys):
        raise ValueError(f"rows = {keys}: expected at least one, each (model, sampler, steps) once")
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds: expected one seed a prompt, at least one prompt"
        )


def _latency(pipe: TurboPipeline, once: Callable[[], Any], repeats: int) -> float:
    """Median seconds from text embedding to frames of a single video, after one warm-up."""
    once()
    seconds: list[float] = []
    for _ in range(max(1, repeats)):
        pipe.synchronize()
        start = time.perf_counter()
        once()
        pipe.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _judged(
    judge: Judge | None,
    videos: Sequence[np.ndarray],
    prompts: Sequence[str],
    shuffles: Sequence[int],
    scores: list[float],
) -> dict[str, Any]:
    """Accuracy against the true and against shifted captions, coverage, and accuracy by attribute."""
    if judge is None:
        return {"accuracy": None, "accuracy_shuffled": None, "coverage": None, "attributes": {}}
    verdicts = [judge.judge(frames, prompt) for frames, prompt in zip(videos, prompts)]
    scores += [float(verdict.accuracy) for verdict in verdicts]
    shifts = [shift for shift in shuffles if shift < len(prompts)]
    shuffled = [
        float(np.mean([judge.judge(frames, prompts[(index + shift) % len(prompts)]).accuracy for shift in shifts]))
        for index, frames in enumerate(videos)
        if shifts
    ]
    attributes: dict[str, list[float]] = {}
    for verdict in verdicts:
        for name, right in verdict.attributes.items():
            attributes.setdefault(attribute_kind(name), []).append(float(right))
    return {
        "accuracy": statistics.fmean(scores),
        "accuracy_interval": bootstrap_interval(scores),
        "accuracy_shuffled": statistics.fmean(shuffled) if shuffled else None,
        "accuracy_shuffled_interval": bootstrap_interval(shuffled),
        "coverage": float(judge.coverage(verdicts)),
        "coverage_interval": jackknife_interval(verdicts, judge.coverage, (0.0, 1.0)),
        "attributes": {
            name: {"accuracy": statistics.fmean(values), "interval": bootstrap_interval(values), "count": len(values)}
            for name, values in attributes.items()
        },
    }


def attribute_kind(name: str) -> str:
    """`colour` for `colour`, `colour_1`, `1.colour` and the like: objects of a clip share a row of the table."""
    return name.strip("0123456789._/ []")


def _fidelity(videos: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> dict[str, Any]:
    """PSNR (dB) and SSIM to the reference's videos of equal prompts and seeds."""
    # At most 100 dB: identical clips would make every mean infinite.
    ratios = [min(psnr(a, b), 100.0) for a, b in zip(videos, references)]
    likeness = [ssim(a, b) for a, b in zip(videos, references)]
    return {
        "psnr": statistics.fmean(ratios),
        "psnr_interval": bootstrap_interval(ratios),
        "ssim": statistics.fmean(likeness),
        "ssim_interval": bootstrap_interval(likeness),
    }


def _compare(rows: list[dict[str, Any]], scores: dict[str, list[float]], reference: str | None) -> None:
    """Adds ratios to the teacher, and for Turbo-sampled students the share of the gap that distillation closed."""
    if reference is None:
        return
    teacher = next(row for row in rows if row["key"] == reference)
    for row in rows:
        row["speedup"] = teacher["latency_s"] / row["latency_s"] if row["latency_s"] else None
        if row["accuracy"] is None or not teacher["accuracy"]:
            continue
        pairs = list(zip(scores[row["key"]], scores[reference]))
        row["relative_accuracy"] = row["accuracy"] / teacher["accuracy"]
        row["relative_accuracy_interval"] = bootstrap_interval(pairs, _ratio)
        row["relative_coverage"] = row["coverage"] / teacher["coverage"] if teacher["coverage"] else None
        baseline = _undistilled(row, rows)
        if baseline is not None:
            trios = list(zip(scores[row["key"]], scores[baseline["key"]], scores[reference]))
            row["undistilled"] = baseline["key"]
            row["gap_closed"] = gap_closed(row["accuracy"], baseline["accuracy"], teacher["accuracy"])
            row["gap_closed_interval"] = bootstrap_interval(trios, _gap)


def _undistilled(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    if row["sampler"] != "turbo" or row["model"] in BASELINES:
        return None
    peers = [other for other in rows if other["sampler"] == "turbo" and other["steps"] == row["steps"]]
    # The better one: the harder comparison.
    return max((peer for peer in peers if peer["model"] in BASELINES), key=lambda peer: peer["accuracy"], default=None)


def _ratio(pairs: list[tuple[float, float]]) -> float:
    below = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / below if below else math.nan


def _gap(trios: list[tuple[float, float, float]]) -> float:
    value, baseline, teacher = (statistics.fmean(column) for column in zip(*trios))
    return gap_closed(value, baseline, teacher)


def _line(result: dict[str, Any], seconds: float) -> str:
    accuracy = (
        f"accuracy {result['accuracy']:.3f}  coverage {result['coverage']:.3f}  "
        if result["accuracy"] is not None
        else ""
    )
    return f"{result['key']}: {accuracy}latency {result['latency_s'] * 1e3:.0f} ms  ({seconds:.0f} s)"


def finite(value: Any) -> Any:
    """JSON knows no nan or infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value
