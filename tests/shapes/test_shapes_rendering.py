"""Pixels: what is drawn is where and what the clip says, inside the frame, apart, and the same however it is asked for.

Legend: T frames, H, W pixels, C colour channels.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from turbotrain.data.shapes import (
    FPS,
    FRAMES,
    GRID,
    SIZE,
    Clip,
    ObjectSpec,
    Scene,
    render_batch,
    render_parallel,
    sample_clip,
    sample_clips,
    start_range,
)
from turbotrain.data.shapes_render import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    coverage_window,
    positions,
    signed_distance,
)

CLIPS = sample_clips(64, seed=5)
FRAMES_BTHWC = render_batch(CLIPS)
OBJECTS = [
    (clip, spec, start) for clip in sample_clips(1_000, seed=2) for spec, start in zip(clip.scene.objects, clip.starts)
]
# Area of each shape in squared radii, from elementary geometry.
AREAS = {
    "circle": math.pi,
    "square": 1.8**2,
    "triangle": 1.95 * 1.2,
    "cross": 2 * 2.2 * 0.76 - 0.76**2,
}


def lone(spec: ObjectSpec, background: str = "black", start: tuple[float, float] = (32.0, 32.0)) -> Clip:
    scene = Scene((spec,), background)
    return Clip(0, scene.caption(), scene, (start,))


def coverage_THW(spec: ObjectSpec, start: tuple[float, float]) -> np.ndarray:
    """How much of each pixel an object covers, read from the colour channel that tells it best from a black ground."""
    ground, paint = (np.asarray(value, dtype=float) for value in (BACKGROUNDS["black"], COLOURS[spec.colour]))
    channel = int(np.abs(paint - ground).argmax())
    frames = lone(spec, start=start).frames_THWC[..., channel].astype(float)
    return (frames - ground[channel]) / (paint - ground)[channel]


def test_clips_are_13_frames_of_64_pixels_at_8_a_second() -> None:
    assert (FRAMES, SIZE, FPS) == (13, 64, 8)
    assert FRAMES_BTHWC.shape == (64, 13, 64, 64, 3)
    assert FRAMES_BTHWC.dtype == np.uint8
    assert FRAMES_BTHWC.flags.c_contiguous


def test_a_clip_alone_and_in_any_batch_has_the_same_pixels() -> None:
    assert np.array_equal(sample_clip(9, seed=5).frames_THWC, FRAMES_BTHWC[9])
    assert np.array_equal(render_batch(CLIPS[::-1]), FRAMES_BTHWC[::-1])
    assert np.array_equal(render_parallel(10, seed=5, start=3), FRAMES_BTHWC[3:13])


def test_all_cores_together_render_what_one_does() -> None:
    count = 300  # more than one chunk of 256
    together = render_parallel(count, seed=5, split="test", start=40)
    assert np.array_equal(together, render_batch(sample_clips(count, 5, "test", start=40)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_shapes_have_their_area_and_move_as_told(shape: str, size: str) -> None:
    for direction, speed in (("left", "slowly"), ("down", "fast")):
        start = (22.3, 38.6)
        cover_THW = coverage_THW(ObjectSpec(shape, "yellow", size, direction, speed), start)
        expected = AREAS[shape] * SIZES[size] ** 2
        assert cover_THW.sum((1, 2)) == pytest.approx(expected, rel=0.04)
        axis = np.arange(SIZE) + 0.5
        centre_T2 = (
            np.stack([(cover_THW.sum(2) @ axis), (cover_THW.sum(1) @ axis)], axis=1) / cover_THW.sum((1, 2))[:, None]
        )
        step = np.asarray(DIRECTIONS[direction]) * SPEEDS[speed]
        assert np.abs(centre_T2 - (np.asarray(start) + np.arange(FRAMES)[:, None] * step)).max() < 0.15


def test_pixels_are_ground_or_between_ground_and_paint() -> None:
    frames_THWC = lone(ObjectSpec("square", "blue", "large", "right", "slowly"), "white").frames_THWC
    low, high = np.minimum(COLOURS["blue"], BACKGROUNDS["white"]), np.maximum(COLOURS["blue"], BACKGROUNDS["white"])
    assert ((frames_THWC >= low) & (frames_THWC <= high)).all()
    assert (frames_THWC == COLOURS["blue"]).all(-1).sum() > 100 * FRAMES
    assert (frames_THWC == BACKGROUNDS["white"]).all(-1).mean() > 0.8


def test_an_object_that_leaves_the_frame_is_cut_off_there() -> None:
    spec = ObjectSpec("circle", "red", "large", "left", "fast")
    area_T = coverage_THW(spec, (32.0, 17.0)).sum((1, 2))
    assert area_T[0] == pytest.approx(AREAS["circle"] * SIZES["large"] ** 2, rel=0.02)
    assert area_T[-1] < 0.5 * area_T[0]


def test_whole_paths_stay_inside_the_frame() -> None:
    for _, spec, start in OBJECTS:
        for y, x in positions(start, spec.direction, spec.speed)[[0, -1]]:
            cover_KPP, corner_K2 = coverage_window(spec.shape, np.array([[y, x]]), SIZES[spec.size], 16)
            painted_N2 = np.argwhere(cover_KPP[0] > 0) + corner_K2[0]
            assert painted_N2.min() >= 0
            assert painted_N2.max() < SIZE


def test_two_objects_never_touch() -> None:
    pairs = [clip for clip in sample_clips(700, seed=3) if len(clip.scene.objects) == 2]
    assert len(pairs) > 300
    for clip in pairs:
        count_THW = np.zeros((FRAMES, SIZE, SIZE), dtype=int)
        for spec, start in zip(clip.scene.objects, clip.starts):
            cover_KPP, corner_K2 = coverage_window(
                spec.shape, positions(start, spec.direction, spec.speed), SIZES[spec.size], 16
            )
            for count_HW, cover_PP, (row, column) in zip(count_THW, cover_KPP, corner_K2):
                rows, columns = np.nonzero(cover_PP > 0)
                count_HW[rows + row, columns + column] += 1
        assert count_THW.max() == 1, clip


def test_start_positions_reach_all_cells_that_the_path_allows() -> None:
    cells = np.zeros((GRID, GRID))
    for _, spec, start in OBJECTS:
        (low_y, high_y), (low_x, high_x) = start_range(spec)
        assert low_y <= start[0] <= high_y
        assert low_x <= start[1] <= high_x
        row, column = (int(value * GRID / SIZE) for value in start)
        cells[row, column] += 1
    share = cells / cells.sum()
    assert (share > 0).all()
    assert np.exp(-(share * np.log(share)).sum()) / cells.size > 0.9


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape='star': expected one of circle, square"):
        signed_distance("star", np.zeros(1), np.zeros(1), 1.0)
