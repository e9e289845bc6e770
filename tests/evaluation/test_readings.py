"""Many clips at once are read as the judge reads them one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turbotrain.data.shapes import render_batch, sample_clips
from turbotrain.evaluation import judge as reference
from turbotrain.evaluation.readings import NAMES, Judgements, judge_clips


def _compared(frames_BTHWC: np.ndarray, captions: list[str]) -> Judgements:
    """The batch's judgements, after comparing every one of them with the reference's."""
    scenes = [reference.parse_caption(caption) for caption in captions]
    found = judge_clips(torch.from_numpy(frames_BTHWC), scenes)
    for index, (frames_THWC, scene) in enumerate(zip(frames_BTHWC, scenes)):
        expected = reference.judge(frames_THWC, scene)
        claims = {"background": bool(found.ground_B[index])}
        for slot in range(len(scene.objects)):
            right_A = found.right_BSA[index, slot].tolist()
            claims.update({f"{slot + 1}.{name}": right for name, right in zip(NAMES, right_A)})
        assert claims == expected.attributes, index
        assert float(found.accuracy_B[index]) == pytest.approx(expected.accuracy)
        cells = [divmod(cell, 4) for cell in found.cell_BS[index].tolist() if cell >= 0]
        assert cells == list(expected.cells), index
    return found


@pytest.mark.parametrize("frames", [13, 25])
def test_rendered_clips_are_right_and_steady(frames: int) -> None:
    clips = sample_clips(12, seed=3, split="test", pairs=0.7)
    found = _compared(render_batch(clips, frames), [clip.caption for clip in clips])
    assert found.accuracy_B.tolist() == [1.0] * 12
    assert found.named_BS.sum().item() == sum(len(clip.scene.objects) for clip in clips)
    assert found.steady_BS[found.named_BS].min() == 1.0
    starts = torch.tensor([start for clip in clips for start in clip.starts])
    torch.testing.assert_close(found.start_BS2[found.named_BS], starts.float(), rtol=0, atol=0.6)


def test_other_captions_noise_and_damage_are_judged_alike() -> None:
    clips = sample_clips(10, seed=4, split="test", pairs=0.6)
    frames = render_batch(clips)
    captions = [clip.caption for clip in clips]
    shifted = _compared(frames, captions[1:] + captions[:1])
    assert shifted.accuracy_B.mean() < 0.6
    rng = np.random.default_rng(0)
    damaged = frames.copy()
    damaged[0, 4:] = damaged[0, 3:4]  # stops
    damaged[1, :8] = damaged[1, :1, :1, :1]  # appears late
    damaged[2] = rng.integers(0, 256, damaged[2].shape)
    damaged[3] = np.clip(damaged[3] + rng.normal(0, 20, damaged[3].shape), 0, 255)
    damaged[4] = 128
    damaged[5] = damaged[5][rng.permutation(13)]  # jumps about
    found = _compared(damaged, captions)
    assert found.steady_BS[5, 0] < 0.7
    assert found.accuracy_B[4] <= 1 / 6
    assert found.steady_BS[4].sum() == 0


def test_parts_join_and_what_does_not_fit_is_refused() -> None:
    clips = sample_clips(4, seed=5)
    frames, scenes = torch.from_numpy(render_batch(clips)), [clip.scene for clip in clips]
    whole = judge_clips(frames, scenes)
    halves = Judgements.joined([judge_clips(frames[:2], scenes[:2]), judge_clips(frames[2:], scenes[2:])])
    assert torch.equal(whole.accuracy_B, halves.accuracy_B)
    with pytest.raises(ValueError, match="one a clip"):
        judge_clips(frames, scenes[:3])
    with pytest.raises(ValueError, match="uint8"):
        judge_clips(frames.float(), scenes)
