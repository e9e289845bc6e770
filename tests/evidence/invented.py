"""Results as `run` and `latency` write them, with invented numbers."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from turbotrain.evidence.forms import Form
from turbotrain.evidence.matrix import Cell, Matrix, Row, load_matrix
from turbotrain.model.attention_config import AttentionConfig

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "evidence" / "shapes_h200.yaml"
SLA = AttentionConfig("sla", 0.1, 32, 32, "cube")
LINEARS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
           "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip


def results() -> dict[str, Any]:
    """Every row of the shipped matrix."""
    matrix, draw = load_matrix(SHIPPED), random.Random(0)
    return {
        "name": matrix.name,
        "recipe": matrix.recipe,
        "prompts": 512,
        "seeds": 4,
        "real": 2048,
        "planned_rows": len(matrix.rows),
        "environment": {"device": "NVIDIA H200", "torch": "2.11.0"},
        "base": {"data": {"seconds": 55.0}},
        "rows": [_row(matrix, cell, row, draw) for cell, row in matrix.rows],
    }


def latencies(seconds: Mapping[Form, float], ratio: float = 1.02) -> dict[str, Any]:
    forms = {
        form.name: {"form": dataclasses.asdict(form), "graph": True, "median_s": value}
        for form, value in seconds.items()
    }
    return {
        "video": "81 frames of 832x480",
        "environment": {"device": "NVIDIA H200"},
        "settings": {"variant": "wan2.1_t2v_1.3b", "dtype": "bfloat16"},
        "forms": forms,
        "samplings": [{"ratio": 1.001}, {"ratio": ratio}],
    }


def _row(matrix: Matrix, cell: Cell, row: Row, draw: random.Random) -> dict[str, Any]:
    is_dense = cell.network == "teacher" or "attention=dense" in cell.train
    topk = next((float(said.split("=")[1]) for said in cell.train if said.startswith("attention.topk=")), SLA.topk)
    own = AttentionConfig() if is_dense else dataclasses.replace(SLA, topk=topk)
    attention = AttentionConfig.from_dict(row.attention, own)
    if row.layer_budget:
        attention = dataclasses.replace(attention, layer_topk=(0.05, 0.05, 0.1, 0.15))
    accuracy = 0.97 - draw.random() * 0.3 / row.evaluations
    values = {"accuracy": accuracy, "coverage": accuracy - 0.1, "motion": accuracy, "psnr": 20 + 10 * accuracy}
    values["shuffled"] = 0.35
    facts: dict[str, Any] = {}
    if row.mass:
        curve = [0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.93, 1.0]
        layers = [[[min(1.0, share + 0.02 * layer) for share in curve]] * 4 for layer in range(4)]
        facts["attention_mass"] = {"topk": [0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0], "layers": layers}
    if row.quantize:
        names = [f"blocks.{block}.{linear}" for block in range(4) for linear in LINEARS]
        facts["sqnr_db"] = {name: [draw.uniform(30, 45), draw.uniform(25, 38)] for name in names}
        facts["input_absmax"] = {name: 10 ** draw.uniform(0, 2) for name in names}
        facts["latent_errors"] = [0.0213, 0.9, 0.0187]  # one clip that falls another way
        facts["kept_float"] = names[:3] if row.quantize.get("target_error") else []
        facts["finetune"] = {"kept": row.name == "int8_tuned"} if row.quantize.get("finetune") else None
        facts["sensitivity"] = {name: 10 ** draw.uniform(-4, -2) for name in names}
    return {
        "cell": cell.name,
        "row": row.name,
        "title": row.label or cell.title,
        "group": cell.group,
        "steps": row.steps,
        "evaluations": row.evaluations,
        "attention": attention.to_dict(),
        "quantize": row.quantize,
        "train": list(cell.train),
        "metrics": {name: [value, value - 0.01, value + 0.01] for name, value in values.items()},
        "facts": facts,
        "film": [_strip()],
        "film_prompt": "a red circle on white",
    }


def _strip() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (384, 64), (200, 120, 40)).save(buffer, format="WEBP")
    return base64.b64encode(buffer.getvalue()).decode()
