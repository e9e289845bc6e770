"""The drawing for GPUs shows what numpy draws."""

from __future__ import annotations

import numpy as np
import pytest

from turbotrain.data.shapes import render_batch, sample_clips
from turbotrain.data.shapes_gpu import render_on


@pytest.mark.parametrize("frames", [13, 21])
def test_both_drawings_are_one(frames: int) -> None:
    clips = sample_clips(24, seed=8, pairs=0.7)
    expected = render_batch(clips, frames).astype(np.int16)
    found = render_on("cpu", clips, frames).numpy().astype(np.int16)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 1e-4
