"""A run folder as the stages leave it, with made-up numbers: what the report is tested and looked at with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from turbotrain.data.shapes import sample_clips
from turbotrain.evaluation.evaluate import Evaluation

ROWS = [
    ("teacher", "teacher", 50, 0.957, 1.9),
    ("sla", "teacher", 50, 0.945, 2.4),
    ("teacher", "turbo", 4, 0.71, 0.085),
    ("teacher", "turbo", 2, 0.48, 0.05),
    ("teacher", "turbo", 1, 0.31, 0.032),
    ("sla", "turbo", 4, 0.70, 0.101),
    ("sla", "turbo", 2, 0.47, 0.058),
    ("sla", "turbo", 1, 0.30, 0.037),
    ("rcm", "turbo", 4, 0.905, 0.101),
    ("rcm", "turbo", 2, 0.84, 0.058),
    ("rcm", "turbo", 1, 0.66, 0.037),
    ("turbo", "turbo", 4, 0.90, 0.082),
    ("turbo", "turbo", 2, 0.835, 0.049),
    ("turbo", "turbo", 1, 0.65, 0.031),
]
ATTRIBUTES = ("background", "shape", "colour", "size", "direction", "speed")


def evaluation(prompts: int = 4) -> Evaluation:
    rng = np.random.default_rng(0)
    clips = sample_clips(prompts, split="test")
    rows, videos = [], {}
    for model, sampler, steps, accuracy, latency in ROWS:
        key = f"{model}-{sampler}-{steps}"
        baseline = next((row[3] for row in ROWS if row[:3] == ("teacher", "turbo", steps)), None)
        distilled = model in ("rcm", "turbo")
        row = {
            "model": model,
            "sampler": sampler,
            "steps": steps,
            "key": key,
            "accuracy": accuracy,
            "accuracy_interval": (accuracy - 0.02, min(1.0, accuracy + 0.02)),
            "accuracy_shuffled": 0.38,
            "coverage": 0.78 * accuracy,
            "coverage_interval": (0.7 * accuracy, 0.84 * accuracy),
            "quantization": "int8_channel" if model == "turbo" else None,
            "relative_accuracy": accuracy / 0.957,
            "relative_accuracy_interval": (accuracy / 0.957 - 0.02, accuracy / 0.957 + 0.02),
            "relative_coverage": accuracy / 0.957,
            "latency_s": latency,
            "speedup": 1.9 / latency,
            "attributes": {
                name: {"accuracy": min(1.0, accuracy + 0.1 * rng.normal()), "count": 64} for name in ATTRIBUTES
            },
        }
        if key != "teacher-teacher-50":
            row.update(psnr=14 + 10 * accuracy, ssim=accuracy - 0.1)
        if distilled and baseline is not None:
            row["gap_closed"] = (accuracy - baseline) / (0.957 - baseline)
            row["gap_closed_interval"] = (row["gap_closed"] - 0.1, row["gap_closed"] + 0.1)
        rows.append(row)
        blur = (1 - accuracy) * 160
        videos[key] = [
            np.clip(clip.frames_THWC + rng.normal(0, blur, clip.frames_THWC.shape), 0, 255).astype(np.uint8)
            for clip in clips
        ]
    environment = {"device": "Example CPU, 2 cores", "torch": "2.13.0", "python": "3.11", "threads": 2}
    captions = [clip.caption for clip in clips]
    return Evaluation(rows, environment, captions, list(range(prompts)), videos, 8.0)


def make_run(folder: Path, prompts: int = 4, steps: int = 300) -> Path:
    """outputs/<run>/ with sla, rcm, quantize and evaluate."""
    rng = np.random.default_rng(1)
    environment = {"commit": "0123abcd4567", "torch": "2.13.0", "device": "Example CPU, 2 cores"}
    for index, name in enumerate(("data", "sla", "rcm", "quantize", "evaluate")):
        stage = folder / name
        (stage / "checkpoint").mkdir(parents=True)
        record = {
            "status": "done" if name != "evaluate" else "running",
            "started": f"2026-01-01T00:0{index}:00Z",
            "finished": f"2026-01-01T00:0{index}:50Z",
            "seconds": 12.3 * (index + 1) ** 2,
            "peak_memory_bytes": 1.3e9,
            "environment": environment,
            "fingerprint": {
                "model.variant": "shapes",
                "seed": 0,
                "input/teacher": "ab12" * 16,
                "input/data": "cd34" * 16,
            },
        }
        (stage / "stage.json").write_text(json.dumps(record))
        if name in ("sla", "rcm", "quantize"):
            (stage / "checkpoint" / "model.safetensors").write_bytes(
                bytes(4_900_000 if name != "quantize" else 1_600_000)
            )
    losses = [0.02 + 0.5 * math.exp(-i / 30) * math.exp(0.2 * rng.normal()) for i in range(steps)]
    lines = [{"step": i, "role": "student", "loss": loss} for i, loss in enumerate(losses)]
    (folder / "sla" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30')
    lines = []
    for i in range(steps):
        if i < steps // 2 or i % 5 == 0:
            line = {"step": i, "role": "student", "loss": 110.0, "scm": 90 + 10 * rng.normal() + 30 * math.exp(-i / 40)}
            line.update({"dmd": 2000 * math.exp(0.3 * rng.normal())} if i >= steps // 2 else {})
        else:
            line = {"step": i, "role": "critic", "loss": 900.0, "critic": 900 * math.exp(-i / 900 + 0.1 * rng.normal())}
        lines.append(line)
    (folder / "rcm" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kinds = [f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
    layers = [
        {
            "name": f"blocks.{block}.{kind}",
            "scheme": "int8_channel",
            "alpha": 0.5,
            **dict(zip(("unsmoothed_sqnr_db", "sqnr_db"), sorted(38 + 4 * rng.normal(size=2)))),
        }
        for block in range(4)
        for kind in kinds
    ]
    (folder / "quantize" / "report.json").write_text(json.dumps({"layers": layers, "latent_error": 0.021}))
    evaluation(prompts).save(folder / "evaluate")
    return folder
