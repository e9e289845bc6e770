"""What of a row decides how long one pass of its network takes, on a Wan network: its form. Rows of one form share a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from turbotrain.compose import UsageError
from turbotrain.evidence.matrix import TEACHER, Cell, Matrix
from turbotrain.model.attention_config import AttentionConfig

# Query and key blocks of a form whose network was trained with smaller ones, which no Wan network of 32,760 tokens uses.
WAN_BLOCKS = (128, 64)


@dataclasses.dataclass(frozen=True)
class Form:
    """attention: as it runs. scheme: of the 8-bit linears, "" for floats; smooth: whether they are smoothed while they run.

    Two things leave no trace: weights that were rounded to 8 bits alone are floats when they run, and a projection P that
    is zero (sparse attention alone, or nothing fine-tuned) is multiplied like any other.
    """

    attention: AttentionConfig
    scheme: str = ""
    smooth: bool = False

    @property
    def name(self) -> str:
        """`sla 0.1 cube, int8_channel smoothed`: a name has one form."""
        own, parts = self.attention, [self.attention.kind]
        if own.is_sparse:
            parts += [f"{own.topk:g}", own.order]
            parts += [f"{own.block_q}x{own.block_k}"] if (own.block_q, own.block_k) != WAN_BLOCKS else []
            parts += [own.feature_map] if own.feature_map != "softmax" else []
        linears = f", {self.scheme}{' smoothed' if self.smooth else ''}" if self.scheme else ""
        return " ".join(parts) + linears


def form_of(attention: AttentionConfig, quantize: Mapping[str, Any]) -> Form | None:
    """The form of a network of this attention, quantised as a row says; None where that depends on its weights (as many linears
    in float as a target takes)."""
    if quantize.get("target_error"):
        return None
    scheme = "" if not quantize or quantize.get("weights_only") else quantize.get("scheme", "int8_channel")
    # What smoothing divides by in a network of 128x128 tiles is all folded into weights.
    smooth = scheme not in ("", "int8_block128") and bool(quantize.get("smooth", True))
    if not attention.is_sparse:
        return Form(AttentionConfig(), scheme, smooth)
    attention = dataclasses.replace(attention, layer_topk=())  # topk stays: their mean
    if min(attention.block_q, attention.block_k) < min(WAN_BLOCKS):
        attention = dataclasses.replace(attention, block_q=WAN_BLOCKS[0], block_k=WAN_BLOCKS[1])
    return Form(attention, scheme, smooth)


def matrix_forms(matrix: Matrix) -> list[Form]:
    """Every form that the rows of a matrix run, in the order of their first rows."""
    found: dict[Form, None] = {}
    trained = _TrainedAttention(matrix)
    for cell, row in matrix.rows:
        attention = AttentionConfig.from_dict(row.attention, trained(cell))
        if row.layer_budget:
            attention = dataclasses.replace(attention, topk=row.layer_budget)
        form = form_of(attention, row.quantize)
        if form is not None:
            found[form] = None
    return list(found)


class _TrainedAttention:
    """The attention of a cell's network, as its training's configuration says it."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self._composed: dict[tuple[str, ...], AttentionConfig] = {}

    def __call__(self, cell: Cell) -> AttentionConfig:
        if cell.network == TEACHER:
            return AttentionConfig()
        if cell.network:
            return self(self._matrix.cell(cell.merge_sla if cell.network == "merge" else cell.network))
        overrides = [*self._matrix.common, *cell.train]
        base = self._compose(tuple(said for said in overrides if said.startswith("attention=")), cell.stage)
        fields = OmegaConf.from_dotlist([said for said in overrides if said.startswith("attention.")])
        return AttentionConfig.from_dict(dict(fields.get("attention", {})), base)

    def _compose(self, groups: tuple[str, ...], stage: str) -> AttentionConfig:
        """The recipe's attention, or the one of `configs/attention` that was chosen. Composing takes most of a second."""
        from turbotrain.config import load_config
        from turbotrain.stages.artifacts import attention_config  # torch and all: the page needs none of it

        if groups not in self._composed:
            # What else it trains from does not matter.
            given = [f"stages=[{stage}]", "data.kind=shards", "data.path=unread"]
            config = load_config([f"recipe={self._matrix.recipe}", *given, *self._matrix.common, *groups])
            self._composed[groups] = attention_config(config)
        return self._composed[groups]


@dataclasses.dataclass(frozen=True)
class Latencies:
    """seconds: of one pass, by the name of its form. document: the whole measurement, {} where there is none."""

    seconds: Mapping[str, float]
    document: Mapping[str, Any]

    def of(self, row: Mapping[str, Any]) -> float | None:
        """Seconds that the passes of a row of the results take; None where its form was not timed.

        A network whose layers have a top-k each counts as one of their mean, or of the next larger one that was timed.
        """
        attention = AttentionConfig.from_dict(row["attention"])
        form = form_of(attention, row.get("quantize") or {})
        if form is None:
            return None
        seconds = self._at_least(form) if attention.layer_topk else self.seconds.get(form.name)
        return None if seconds is None else row["evaluations"] * seconds

    @property
    def worst_ratio(self) -> float | None:
        """A whole sampling over the arithmetic, the ratio that is farthest from 1; None where none was timed."""
        ratios = [sampling["ratio"] for sampling in self.document.get("samplings", [])]
        return max(ratios, key=lambda ratio: abs(ratio - 1), default=None)

    def _at_least(self, form: Form) -> float | None:
        """Of the forms that were timed and differ from this one in top-k alone: the one with the smallest from its own on."""
        timed = {value["form"]["attention"]["topk"] for value in self.document.get("forms", {}).values()}
        for larger in sorted(value for value in timed if value >= form.attention.topk - 1e-6):
            attention = dataclasses.replace(form.attention, topk=larger)
            if (seconds := self.seconds.get(dataclasses.replace(form, attention=attention).name)) is not None:
                return seconds
        return None


def read_latencies(path: Path) -> Latencies:
    """What `latency.measure_forms` wrote; empty where there is no file. Raises UsageError for another file."""
    if not path.is_file():
        return Latencies({}, {})
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        forms = document["forms"]
        return Latencies({name: form["median_s"] for name, form in forms.items() if "median_s" in form}, document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not what `tools/evidence.py latency` writes ({error!r})") from error
