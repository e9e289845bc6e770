"""Fidelity between two clips and honest intervals for small samples.

Shapes: T frames, H height, W width, C channels; clips are uint8 unless said. PSNR and SSIM follow their textbook definitions
(SSIM: Wang et al. 2004, Gaussian window of 11 pixels and sigma 1.5, valid positions only, K1 = .01, K2 = .03, mean over
channels). Intervals are percentile bootstraps, which assume no shape of the distribution, but for coverage's jackknife.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RANGE = 255.0
WINDOW, SIGMA = 11, 1.5


def psnr(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
    """Peak signal-to-noise ratio over the whole clip in dB; infinite for identical clips."""
    _check_pair(a_THWC, b_THWC)
    error = float(np.mean((a_THWC.astype(np.float64) - b_THWC.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(RANGE**2 / error)


def ssim(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
    """Structural similarity, mean over frames, channels and window positions: 1 for identical clips.

    Raises:
        ValueError: shapes differ, or frames are smaller than the window of 11 pixels.
    """
    _check_pair(a_THWC, b_THWC)
    if min(a_THWC.shape[1:3]) < WINDOW:
        raise ValueError(f"frames of {a_THWC.shape[1]}x{a_THWC.shape[2]}: SSIM needs at least {WINDOW} pixels a side")
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    windows = _window_matrix(a_THWC.shape[1]), _window_matrix(a_THWC.shape[2])
    total = 0.0
    # Frame by frame: five float64 planes of one frame are all that lives at a time.
    for a_HWC, b_HWC in zip(a_THWC, b_THWC):
        a, b = a_HWC.astype(np.float64), b_HWC.astype(np.float64)
        mean_a, mean_b = _blur(a, *windows), _blur(b, *windows)
        var_a, var_b = _blur(a * a, *windows) - mean_a**2, _blur(b * b, *windows) - mean_b**2
        covariance = _blur(a * b, *windows) - mean_a * mean_b
        score = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
            (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
        )
        total += float(score.mean())
    return total / len(a_THWC)


def bootstrap_interval(
    items: Sequence[Any] | np.ndarray,
    statistic: Callable[[list[Any]], float] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic (mean by default) of independent items; (nan, nan) without items.

    Args:
        items: one entry a prompt: numbers for the mean, anything for a statistic of your own (tuples give paired intervals).
        resamples: draws with replacement; 1000 put about .4 percentage points of noise on the ends of a 95% interval.
    """
    count = len(items)
    if count == 0:
        return math.nan, math.nan
    picks = np.random.default_rng(seed).integers(0, count, (resamples, count))
    if statistic is None:
        values = np.asarray(items, dtype=np.float64)[picks].mean(axis=1)
    else:
        values = np.asarray([statistic([items[i] for i in row]) for row in picks], dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def jackknife_interval(
    items: Sequence[Any],
    statistic: Callable[[list[Any]], float],
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float]:
    """95% interval of a statistic from its leave-one-out values: estimate +- 1.96 standard errors, cut off at `limits`.

    limits: between which the statistic lies by definition; beside them a symmetric interval claims what cannot be.

    For statistics of how many different things there are (coverage): a bootstrap sample repeats items and so always looks
    poorer than the sample that it was drawn from.
    """
    count = len(items)
    if count < 2:
        return math.nan, math.nan
    whole = list(items)
    reach = jackknife_reach([statistic(whole[:i] + whole[i + 1 :]) for i in range(count)])
    estimate = statistic(whole)
    return max(limits[0], estimate - reach), min(limits[1], estimate + reach)


def jackknife_reach(left_out: Sequence[float] | np.ndarray) -> float:
    """How far a 95% interval reaches to either side, given a statistic's leave-one-out values: 1.96 standard errors."""
    return 1.96 * math.sqrt((len(left_out) - 1) * float(np.var(left_out)))


def gap_closed(value: float, baseline: float, teacher: float) -> float:
    """Fraction of the distance from `baseline` to `teacher` that `value` covers; nan where the two do not differ."""
    return (value - baseline) / (teacher - baseline) if teacher != baseline else math.nan


def _blur(plane_HWC: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Separable Gaussian window over the two leading axes as two matrix products; (C, H', W'), valid positions only."""
    return rows @ plane_HWC.transpose(2, 0, 1) @ columns.T


def _window_matrix(size: int) -> np.ndarray:
    """(size - 10, size): row i weighs positions i to i + 10."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * SIGMA**2))
    matrix = np.zeros((size - WINDOW + 1, size))
    for row in range(len(matrix)):
        matrix[row, row : row + WINDOW] = window / window.sum()
    return matrix


def _check_pair(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"clips have shapes {a.shape} and {b.shape}: expected two equal (T, H, W, C)")
