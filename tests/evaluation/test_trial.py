"""Clips judged where they are decoded: by their own captions and by others'."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from turbotrain.data.shapes import render_batch, sample_clips
from turbotrain.evaluation import trial as module
from turbotrain.evaluation.quality import summarise
from turbotrain.evaluation.readings import judge_clips
from turbotrain.evaluation.trial import Trial, measure_trial, reference_frames


@pytest.mark.parametrize("together", [2, 5])  # parts that end between prompts, and within one
def test_every_clip_is_judged_by_its_own_caption_and_by_the_next_prompts(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(module, "JUDGED_TOGETHER", together)
    prompts = sample_clips(3, seed=4, split="test", pairs=1.0)
    trial = Trial(prompts, 2, 13)
    frames = torch.from_numpy(render_batch([clip for clip in prompts for _ in range(2)], 13))

    def decode_here(at_N: Tensor) -> Tensor:
        return frames[at_N]

    pipe: Any = SimpleNamespace(codec=SimpleNamespace(decode_here=decode_here))
    latents = torch.arange(6)
    found = measure_trial(pipe, trial, latents, reference_frames(pipe, latents))
    numbers = summarise(found, 2, found.features)
    assert numbers["accuracy"] == [1.0, 1.0, 1.0]
    assert numbers["psnr"][0] == 100.0
    assert found.shuffled is not None
    next_prompts = [prompts[index].scene for index in (1, 1, 2, 2, 0, 0)]
    assert torch.equal(found.shuffled.accuracy_B, judge_clips(frames, next_prompts).accuracy_B)
    assert numbers["shuffled"][0] < 0.7
