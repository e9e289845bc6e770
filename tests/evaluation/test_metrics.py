"""Fidelity against direct formulas, intervals against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from turbotrain.evaluation.judge import Judgement, coverage
from turbotrain.evaluation.metrics import bootstrap_interval, gap_closed, jackknife_interval, psnr, ssim


def clips(seed: int = 0, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (2, size, size + 3, 3)).astype(np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-30, 30, a.shape), 0, 255).astype(np.uint8)
    return a, b


def direct_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window, in two dimensions, as the paper writes it."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = []
    for t in range(a.shape[0]):
        for c in range(3):
            for y in range(a.shape[1] - 10):
                for x in range(a.shape[2] - 10):
                    p = a[t, y : y + 11, x : x + 11, c].astype(float)
                    q = b[t, y : y + 11, x : x + 11, c].astype(float)
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    scores.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(scores))


def test_psnr() -> None:
    a = np.zeros((1, 2, 2, 3), np.uint8)
    b = a.copy()
    b[0, 0, 0, 0] = 12  # mean square 144 / 12 = 12
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / 12))
    assert psnr(a, a) == math.inf


def test_ssim_is_the_papers() -> None:
    a, b = clips()
    assert ssim(a, b) == pytest.approx(direct_ssim(a, b), rel=1e-9)
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, 255 - a) < 0


def test_clips_must_match() -> None:
    a, b = clips()
    with pytest.raises(ValueError, match="expected two equal"):
        psnr(a, b[:1])
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(a[:, :8], b[:, :8])


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, 40), resamples=300, seed=seed)
        covered += low <= 3.0 <= high
    # 95% of 200 is 190; binomial spread 3.1; percentile intervals of 40 items are a little narrow.
    assert 176 <= covered <= 199


def test_interval_of_a_statistic_is_paired() -> None:
    """Both sides saw the same prompts: a ratio of perfectly correlated scores has no spread."""
    teacher = np.random.default_rng(0).uniform(0.5, 1.0, 50)
    pairs = list(zip(0.8 * teacher, teacher))
    low, high = bootstrap_interval(pairs, lambda items: sum(a for a, _ in items) / sum(b for _, b in items))
    assert low == pytest.approx(0.8)
    assert high == pytest.approx(0.8)


def test_jackknife_is_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=30).tolist()
    low, high = jackknife_interval(values, lambda items: sum(items) / len(items))
    error = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(30)
    assert (low, high) == pytest.approx((np.mean(values) - error, np.mean(values) + error))


def test_interval_of_nothing() -> None:
    assert all(math.isnan(end) for end in bootstrap_interval([]))
    assert all(math.isnan(end) for end in jackknife_interval([1.0], sum))


def test_an_interval_of_coverage_holds_only_what_coverage_can_be() -> None:
    verdicts = [Judgement({}, ((cell // 4, cell % 4),)) for cell in [*range(16), *range(16), 3]]
    low, high = jackknife_interval(verdicts, coverage, (0.0, 1.0))
    free = jackknife_interval(verdicts, coverage)
    assert low == free[0]
    assert low <= coverage(verdicts) <= high == 1.0 < free[1]
    low, high = jackknife_interval([0.0, 0.0, 0.0, 1.0], lambda items: sum(items) / len(items), (0.0, 1.0))
    assert low == 0.0 < high < 1.0


def test_gap_closed() -> None:
    assert gap_closed(0.8, 0.6, 1.0) == pytest.approx(0.5)
    assert math.isnan(gap_closed(0.8, 1.0, 1.0))
