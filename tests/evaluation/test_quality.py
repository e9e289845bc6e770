"""Numbers about many clips, against closed forms and the one-clip functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turbotrain.data.shapes import render_batch, sample_clips
from turbotrain.evaluation import judge as reference
from turbotrain.evaluation import metrics
from turbotrain.evaluation.frechet import FEATURES, clip_features, frechet_distance
from turbotrain.evaluation.quality import (
    Measured,
    _jackknifed,
    _ratio,
    clip_psnr,
    clip_ssim,
    coverage_of_counts,
    entropy_of_counts,
    prompt_values,
    summarise,
)
from turbotrain.evaluation.readings import Judgements, judge_clips

SEEDS = 2


@pytest.fixture(scope="module")
def clips_and_frames():
    clips = sample_clips(24, seed=6, split="test", pairs=0.8)
    return clips, torch.from_numpy(render_batch(clips))


def test_likeness_equals_the_textbook_forms_clip_by_clip() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 2, 16, 20, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 12, a.shape), 0, 255).astype(np.uint8)
    b[2] = a[2]
    found_psnr, found_ssim = clip_psnr(*map(torch.from_numpy, (a, b))), clip_ssim(*map(torch.from_numpy, (a, b)))
    expected = [min(100.0, metrics.psnr(x, y)) for x, y in zip(a, b)]
    assert found_psnr.tolist() == pytest.approx(expected, rel=1e-5)
    assert found_ssim.tolist() == pytest.approx([metrics.ssim(x, y) for x, y in zip(a, b)], abs=1e-5)


def test_frechet_distance_of_gaussians_is_known() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200_000, 3)) * [1, 2, 3]
    b = rng.standard_normal((200_000, 3)) * [2, 2, 1] + [0, 1, 0]
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 0 + 4, rel=0.02)  # |mean|^2 + sum of (sd_a - sd_b)^2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(a[:1], b)


def test_features_are_fixed_and_tell_worlds_apart(clips_and_frames) -> None:
    _, frames = clips_and_frames
    features = clip_features(frames)
    assert features.shape == (24, FEATURES)
    assert torch.equal(features, clip_features(frames))
    # These very numbers: results of different machines and years are compared.
    assert features.double().mean().item() == pytest.approx(0.2156125, rel=1e-4)
    other = torch.from_numpy(render_batch(sample_clips(24, seed=7, split="test", pairs=0.8)))
    gray = (frames.float() * 0.5 + 64).to(torch.uint8)
    near = frechet_distance(features.numpy(), clip_features(other).numpy())
    assert frechet_distance(features.numpy(), clip_features(gray).numpy()) > 2 * near


def test_coverage_and_entropy_of_counts() -> None:
    assert coverage_of_counts(np.full(16, 5)) == pytest.approx(1)
    assert entropy_of_counts(np.full(16, 5)) == pytest.approx(4)
    assert coverage_of_counts(np.eye(16)[3]) == pytest.approx(1 / 16)
    assert coverage_of_counts(np.zeros(16)) == entropy_of_counts(np.zeros(16)) == 0


def test_a_summary_of_rendered_clips(clips_and_frames) -> None:
    clips, frames = clips_and_frames
    scenes = [clip.scene for clip in clips]
    judged, features = judge_clips(frames, scenes), clip_features(frames).numpy()
    found = summarise(Measured(judged, features), SEEDS, features)
    for name in ("accuracy", "shape", "colour", "size", "direction", "speed", "background", "motion", "steady"):
        assert found[name] == [1.0, 1.0, 1.0], name
    expected = reference.coverage([reference.judge(frame, scene) for frame, scene in zip(frames.numpy(), scenes)])
    value, low, high = found["coverage"]
    assert value == pytest.approx(expected, abs=1e-5)
    assert low < value < high <= 1
    assert found["frechet"][0] == pytest.approx(0, abs=1e-6)
    assert found["spread"][0] > 5
    assert not {"psnr", "shuffled"} & set(found)
    wrong = judge_clips(frames, scenes[1:] + scenes[:1])
    found = summarise(Measured(wrong, features, shuffled=judged), SEEDS, features)
    assert found["shuffled"] == [1.0, 1.0, 1.0]
    assert found["accuracy"][1] < found["accuracy"][0] == pytest.approx(float(_pooled(wrong)), abs=1e-5)
    with pytest.raises(ValueError, match="7 seeds"):
        summarise(Measured(judged, features), 7, features)


def test_numbers_by_prompt_have_the_mean_and_the_error_of_their_metric() -> None:
    torch.manual_seed(0)
    prompts, seeds = 100, 4
    named_NS = torch.ones(prompts * seeds, 2, dtype=torch.bool)
    right_NSA = torch.rand(prompts, 1, 1, 5).expand(-1, seeds, 2, -1).flatten(0, 1) > torch.rand(prompts * seeds, 2, 5)
    start_NS2 = 64 * torch.rand(prompts * seeds, 2, 2) ** 1.5  # more of them near one corner
    judged = Judgements(
        named_NS, right_NSA, torch.rand(prompts * seeds) < 0.9, start_NS2, torch.rand(prompts * seeds, 2)
    )
    found = prompt_values(judged, seeds)
    assert found["accuracy"] == pytest.approx(judged.accuracy_B.view(-1, seeds).mean(1).numpy(), abs=1e-6)
    summary = summarise(Measured(judged, np.random.default_rng(0).normal(size=(prompts * seeds, 4))), seeds, np.eye(4))
    for name, values_P in found.items():
        value, low, high = summary[name]
        # Coverage from some 200 starts in 16 cells is biased by about 15 / 400 of itself, which the jackknife takes off.
        assert values_P.mean() == pytest.approx(value, rel=0.05 if name == "coverage" else 0.01), name
        error = values_P.std(ddof=1) / prompts**0.5
        assert 2 * 1.96 * error == pytest.approx(high - low, rel=1e-4 if name == "coverage" else 0.15), name
    assert set(prompt_values(judged, 1)) == {"accuracy", "coverage"}


def _pooled(judged) -> float:
    """All right claims over all claims."""
    return (judged.right_BSA.sum() + judged.ground_B.sum()) / (5 * judged.named_BS.sum() + len(judged.ground_B))


def test_intervals_respect_that_seeds_of_a_prompt_are_alike() -> None:
    rng = np.random.default_rng(1)
    alike = np.repeat(rng.integers(0, 2, 100), 4)
    ones = np.ones(400)
    clustered, naive = _ratio(alike, ones, 4), _ratio(alike, ones, 1)
    assert clustered.value == naive.value
    # Four copies tell no more than one: the honest interval is twice as wide.
    assert clustered.high - clustered.low == pytest.approx(2 * (naive.high - naive.low), rel=0.15)


def test_the_jackknifes_error_of_a_share_is_the_textbooks() -> None:
    counts_PC = np.eye(2)[np.repeat([0, 1], [30, 70])]
    found = _jackknifed(counts_PC, lambda counts_C: counts_C[0] / counts_C.sum(), (0.0, 1.0))
    error = 1.96 * np.sqrt(0.3 * 0.7 / 99)
    assert found.to_list() == pytest.approx([0.3, 0.3 - error, 0.3 + error], abs=1e-6)
