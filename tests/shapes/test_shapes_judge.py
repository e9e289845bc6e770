"""The judge: right on what is rendered, at chance on noise and on others' captions, wrong exactly where a clip is wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest

from turbotrain.data.shapes import ATTRIBUTES, FRAMES, Clip, ObjectSpec, Scene, render_batch, sample_clips
from turbotrain.data.shapes_render import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZE, SIZES, SPEEDS, draw, positions
from turbotrain.evaluation.judge import Judgement, coverage, judge, read_clip

CLIPS = sample_clips(240, seed=1, split="test")
FRAMES_BTHWC = render_batch(CLIPS)
RED = ObjectSpec("circle", "red", "small", "left", "slowly")
BLUE = ObjectSpec("cross", "blue", "large", "up", "fast")
VALUES = {**ATTRIBUTES, "background": tuple(BACKGROUNDS)}


def scene_of(*objects: ObjectSpec, background: str = "gray") -> Scene:
    return Scene(objects, background)


def film(scene: Scene, *starts: tuple[float, float]) -> np.ndarray:
    return Clip(0, scene.caption(), scene, starts).frames_THWC


def mean_accuracy(frames: Sequence[np.ndarray], clips: Sequence[Clip] = CLIPS) -> float:
    return float(np.mean([judge(video, clip.caption).accuracy for video, clip in zip(frames, clips)]))


@pytest.fixture(scope="module")
def judgements() -> list[Judgement]:
    return [judge(video, clip.caption) for video, clip in zip(FRAMES_BTHWC, CLIPS)]


def test_rendered_clips_are_read_right(judgements: list[Judgement]) -> None:
    assert np.mean([verdict.accuracy for verdict in judgements]) >= 0.99
    for clip, verdict in zip(CLIPS, judgements):
        names = [f"{slot}.{name}" for slot in range(1, len(clip.scene.objects) + 1) for name in ATTRIBUTES]
        assert list(verdict.attributes) == ["background", *names]
        assert len(verdict.attributes) == clip.scene.attribute_count
    assert coverage(judgements) > 0.9


def test_a_scene_is_judged_like_its_caption() -> None:
    for video, clip in zip(FRAMES_BTHWC[:5], CLIPS):
        assert judge(video, clip.scene) == judge(video, clip.caption)


def test_start_cells_are_those_of_the_clip(judgements: list[Judgement]) -> None:
    """A tenth of a pixel of error may cross a cell's border, rarely."""
    right = total = 0
    for clip, verdict in zip(CLIPS, judgements):
        expected = [(int(y // 16), int(x // 16)) for y, x in clip.starts]
        right += sum(cell == other for cell, other in zip(verdict.cells, expected))
        total += len(expected)
    assert right / total > 0.97


def test_noise_is_at_chance() -> None:
    rng = np.random.default_rng(0)
    some = FRAMES_BTHWC[:24]
    assert mean_accuracy(rng.integers(0, 256, some.shape, dtype=np.uint8)) <= 0.35
    scattered = some.reshape(len(some), -1, 3).copy()
    for (
        pixels
    ) in scattered:  # the right colours at the wrong places: colours and ground are right, nothing else but by luck
        rng.shuffle(pixels)
    assert mean_accuracy(scattered.reshape(some.shape)) < 0.6
    assert mean_accuracy(np.full_like(some, 122)) < 0.1  # an empty ground may be the right ground


def test_shuffled_captions_are_at_chance() -> None:
    for shift in (1, 2):
        others = CLIPS[shift:] + CLIPS[:shift]
        assert mean_accuracy(FRAMES_BTHWC[:100], others) <= 0.45


@pytest.mark.parametrize("sigma", [4.0, 12.0])
def test_slight_noise_changes_nothing(sigma: float) -> None:
    noise = np.random.default_rng(0).normal(0, sigma, FRAMES_BTHWC[:40].shape)
    noisy = np.clip(FRAMES_BTHWC[:40] + noise, 0, 255).astype(np.uint8)
    assert mean_accuracy(noisy) >= 0.99


def test_slight_blur_changes_nothing() -> None:
    blurred = FRAMES_BTHWC[:40].astype(np.float32)
    for axis in (2, 3):
        padded = np.take(blurred, np.clip(np.arange(-1, SIZE + 1), 0, SIZE - 1), axis)
        before, here, after = (np.take(padded, np.arange(SIZE) + shift, axis) for shift in range(3))
        blurred = 0.25 * before + 0.5 * here + 0.25 * after
    assert mean_accuracy(np.rint(blurred).astype(np.uint8)) >= 0.98


@pytest.mark.parametrize("name", list(VALUES))
def test_each_wrong_attribute_costs_exactly_itself(name: str) -> None:
    """One clip, every caption that differs from it in one attribute of the first object, or in the ground."""
    scene = scene_of(RED, BLUE)
    video = film(scene, (12.0, 40.0), (50.0, 20.0))
    assert judge(video, scene).accuracy == 1.0
    true = scene.background if name == "background" else getattr(RED, name)
    for value in VALUES[name]:
        if value in (true, BLUE.colour):
            continue
        if name == "background":
            told, key = dataclasses.replace(scene, background=value), "background"
        else:
            told, key = scene_of(dataclasses.replace(RED, **{name: value}), BLUE), f"1.{name}"
        verdict = judge(video, told)
        assert {key for key, right in verdict.attributes.items() if not right} == {key}
        assert verdict.accuracy == pytest.approx(10 / 11)
        # Start positions count only where shape and colour are right.
        assert len(verdict.cells) == (1 if name in ("shape", "colour") else 2)


def test_the_order_of_the_objects_does_not_matter() -> None:
    video = film(scene_of(RED, BLUE), (12.0, 40.0), (50.0, 20.0))
    first, second = judge(video, scene_of(RED, BLUE)), judge(video, scene_of(BLUE, RED))
    assert first.accuracy == second.accuracy == 1.0
    assert first.cells == second.cells[::-1] == ((0, 2), (3, 1))


def test_attributes_bound_to_the_wrong_object_are_wrong() -> None:
    """A red cross and a blue circle are not a red circle and a blue cross."""
    swapped = (dataclasses.replace(RED, shape=BLUE.shape), dataclasses.replace(BLUE, shape=RED.shape))
    verdict = judge(film(scene_of(*swapped), (12.0, 40.0), (50.0, 20.0)), scene_of(RED, BLUE))
    assert {name for name, right in verdict.attributes.items() if not right} == {"1.shape", "2.shape"}
    assert verdict.cells == ()


def test_a_missing_object_loses_all_its_attributes() -> None:
    verdict = judge(film(scene_of(BLUE), (50.0, 20.0)), scene_of(RED, BLUE))
    assert [name for name, right in verdict.attributes.items() if not right] == [f"1.{name}" for name in ATTRIBUTES]
    assert verdict.cells == ((3, 1),)


def test_the_larger_object_is_judged_where_the_caption_has_one() -> None:
    """Nothing that the caption claims is lost by an object too many."""
    video = film(scene_of(RED, BLUE), (12.0, 40.0), (50.0, 20.0))
    assert judge(video, scene_of(BLUE)).accuracy == 1.0


def test_an_object_that_stands_still_has_no_direction_and_no_speed() -> None:
    centre_T2 = np.tile([30.0, 30.0], (FRAMES, 1))
    video = draw([(0, "square", "green", "large", centre_T2)], ["white"])[0]
    told = scene_of(ObjectSpec("square", "green", "large", "up", "slowly"), background="white")
    wrong = {name for name, right in judge(video, told).attributes.items() if not right}
    assert wrong == {"1.direction", "1.speed"}


def test_an_object_seen_too_briefly_has_no_motion() -> None:
    spec = dataclasses.replace(BLUE, direction="right", speed="fast")
    video = film(scene_of(spec), (32.0, 16.0)).copy()
    video[5:] = BACKGROUNDS["gray"]
    wrong = {name for name, right in judge(video, scene_of(spec)).attributes.items() if not right}
    assert wrong == {"1.direction", "1.speed"}


def test_what_appears_late_starts_where_its_path_began() -> None:
    spec = dataclasses.replace(BLUE, direction="right", speed="fast")
    video = film(scene_of(spec), (40.0, 14.0)).copy()
    video[:4] = BACKGROUNDS["gray"]  # first seen at x = 20, in the next cell
    verdict = judge(video, scene_of(spec))
    assert verdict.accuracy == 1.0
    assert verdict.cells == ((2, 0),)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_object_is_read_on_every_ground(background: str, colour: str) -> None:
    rng = np.random.default_rng(0)
    objects, expected = [], []
    for shape in SHAPES:
        for size in SIZES:
            direction, speed = str(rng.choice(list(DIRECTIONS))), str(rng.choice(list(SPEEDS)))
            expected.append({"shape": shape, "colour": colour, "size": size, "direction": direction, "speed": speed})
            start = (30 + rng.random(), 30 + rng.random())
            objects.append((len(objects), shape, colour, size, positions(start, direction, speed)))
    for video, attributes in zip(draw(objects, [background] * len(objects)), expected):
        ground, (found,) = read_clip(video, 1)
        assert ground == background
        assert found is not None
        assert found.attributes == attributes


def verdict_in(*cells: tuple[int, int]) -> Judgement:
    return Judgement({"background": True}, cells)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([], 0.0),
        ([()], 0.0),
        ([((1, 2),)] * 9, 1 / 16),
        ([((0, 0),), ((0, 1),), ((0, 0),), ((0, 1),)], 2 / 16),
        # Shares 3/4 and 1/4, as one clip with two objects and one with two.
        ([((0, 0), (0, 0)), ((0, 0), (3, 3))], math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / 16),
        ([((row, column),) for row in range(4) for column in range(4)], 1.0),
    ],
    ids=["no clips", "nothing right", "one cell", "two cells", "uneven", "all"],
)
def test_coverage_by_hand(cells: list[tuple[tuple[int, int], ...]], expected: float) -> None:
    assert coverage([verdict_in(*each) for each in cells]) == pytest.approx(expected, abs=1e-12)


def test_accuracy_is_the_fraction_read_right() -> None:
    assert Judgement({"background": True, "1.shape": False, "1.colour": True, "1.size": False}, ()).accuracy == 0.5


@pytest.mark.parametrize("shape", [(13, 32, 64, 3), (13, 64, 64), (13, 64, 64, 4), (1, 13, 64, 64, 3), (0, 64, 64, 3)])
def test_frames_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"frames are .*: the judge reads clips of 64x64 pixels"):
        judge(np.zeros(shape, np.uint8), scene_of(RED))


def test_captions_outside_the_grammar_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one or two objects"):
        judge(FRAMES_BTHWC[0], "a cat on a boat")
