"""Published claims as comparisons of measured rows, and what the data say of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from turbotrain.evaluation.metrics import bootstrap_interval

Key = tuple[str, str]  # (cell, row)
Rows = Mapping[Key, Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """`metric` of `left` is at least `factor` times that of `right`, less `margin`."""

    text: str
    left: Key
    right: Key
    metric: str = "accuracy"
    margin: float = 0.0
    factor: float = 1.0


WORDS = ("holds", "fails", "holds, not significantly", "fails, not significantly")
TEACHER, STUDENT, TURBO = ("teacher", "s50"), ("rcm_staged", "s4"), ("turbo", "int8_4")
SPARSE_ALONE = (
    ("0.1", "sla010", "sparse_only"),
    ("0.05", "sla005", "sparse_only005"),
    ("0.025", "sla0025", "sparse_only0025"),
)
CLAIMS = (
    Claim("rCM covers at least as much as DMD, 4 steps", STUDENT, ("dmd", "s4"), "coverage"),
    Claim("rCM covers at least as much as DMD, 1 step", ("rcm_staged", "s1"), ("dmd", "s1"), "coverage"),
    Claim(
        "seeds of a prompt differ under rCM at least as much as under DMD, 4 steps", STUDENT, ("dmd", "s4"), "spread"
    ),
    Claim("rCM is at least as accurate as sCM, 4 steps", STUDENT, ("scm", "s4")),
    Claim("rCM is at least as accurate as sCM, 1 step", ("rcm_staged", "s1"), ("scm", "s1")),
    *(
        Claim(
            f"sparse + linear is at least as accurate as sparse alone, both fine-tuned at top-k {topk}",
            (sla, "s20"),
            (sparse, "s20"),
        )
        for topk, sla, sparse in SPARSE_ALONE
    ),
    Claim("rCM in 4 steps is within 2 points of the teacher", STUDENT, TEACHER, margin=0.02),
    Claim("rCM in 1 step is within 10 points of the teacher", ("rcm_staged", "s1"), TEACHER, margin=0.10),
    Claim("top-k 0.1 + W8A8 cost at most 2 points more, 4 steps", TURBO, STUDENT, margin=0.02),
    Claim("full Turbo (SLA 0.1, 4 steps, int8) is within 3 points of the teacher", TURBO, TEACHER, margin=0.03),
    Claim("full Turbo covers at least 0.9 of what the teacher covers", TURBO, TEACHER, "coverage", factor=0.9),
)


@dataclass(frozen=True)
class Verdict:
    """difference: by how much the claim holds (negative: fails), with a 95% interval. paired: prompt by prompt; otherwise, where
    a row has no numbers by prompt, the two count as independent, which is wider where they err alike. word: one of WORDS."""

    claim: Claim
    left: float
    right: float
    difference: float
    low: float
    high: float
    paired: bool

    @property
    def word(self) -> str:
        decided = self.low >= 0 or self.high < 0
        return WORDS[2 * (not decided) + (self.difference < 0)]


def judge_claim(claim: Claim, rows: Rows) -> Verdict | None:
    """None where a row is missing."""
    left, right = rows.get(claim.left, {}), rows.get(claim.right, {})
    found = difference(left, right, claim.metric, claim.factor)
    if found is None:
        return None
    values = [row["metrics"][claim.metric][0] for row in (left, right)]
    by = [number + claim.margin for number in (found.value, found.low, found.high)]
    return Verdict(claim, values[0], values[1], by[0], by[1], by[2], found.paired)


class Difference(NamedTuple):
    """left - factor * right with a 95% interval; paired as in `Verdict`."""

    value: float
    low: float
    high: float
    paired: bool


def difference(
    left: Mapping[str, Any], right: Mapping[str, Any], metric: str, factor: float = 1.0
) -> Difference | None:
    """Between two rows of the results; None where one has not that metric."""
    found = [row.get("metrics", {}).get(metric) for row in (left, right)]
    if any(value is None or any(number is None for number in value) for value in found):
        return None
    (a, a_low, a_high), (b, b_low, b_high) = found  # type: ignore[misc]
    value = a - factor * b
    a_P, b_P = (np.asarray(row.get(f"{metric}_by_prompt", ()), dtype=np.float64) for row in (left, right))
    if a_P.size and a_P.shape == b_P.shape and np.isfinite(a_P).all() and np.isfinite(b_P).all():
        differences_P = a_P - factor * b_P
        # Around the difference itself: the mean of coverage's numbers by prompt is the estimate but for its bias.
        low, high = bootstrap_interval(differences_P - differences_P.mean())
        return Difference(value, value + low, value + high, True)
    # The ends that matter: a claim is doubted from the left's lower end and the right's upper one.
    below = math.hypot(a - a_low, factor * (b_high - b))
    above = math.hypot(a_high - a, factor * (b - b_low))
    return Difference(value, value - below, value + above, False)
