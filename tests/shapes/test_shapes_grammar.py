"""Captions and scenes: there and back, what is held out, how often each attribute is asked for."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from turbotrain.data.shapes import (
    ATTRIBUTES,
    VERBS,
    Clip,
    ObjectSpec,
    Scene,
    is_held_out,
    parse_caption,
    render_batch,
    render_parallel,
    sample_clip,
    sample_clips,
    vocabulary,
)
from turbotrain.data.shapes_render import BACKGROUNDS

RED = ObjectSpec("circle", "red", "small", "left", "slowly")
BLUE = ObjectSpec("cross", "blue", "large", "up", "fast")
PHRASE = RED.phrase()
TRAIN = sample_clips(2_000, seed=0)
TEST = sample_clips(600, seed=0, split="test")


def all_objects(clips: list[Clip]) -> list[ObjectSpec]:
    return [spec for clip in clips for spec in clip.scene.objects]


def test_the_world_is_as_rich_as_promised() -> None:
    least = {"shape": 4, "colour": 6, "size": 2, "direction": 4, "speed": 2}
    assert {name: len(values) >= least[name] for name, values in ATTRIBUTES.items()} == dict.fromkeys(least, True)
    assert len(BACKGROUNDS) >= 3


def test_captions_say_the_scene_in_every_form() -> None:
    scene = Scene((RED, BLUE), "gray")
    assert scene.caption() == (
        "a small red circle moves left slowly and a large blue cross moves up fast on a gray background"
    )
    assert Scene((RED,), "white").caption("slides", background_first=True) == (
        "on a white background, a small red circle slides left slowly"
    )
    for verb, first in itertools.product(VERBS, (False, True)):
        assert parse_caption(scene.caption(verb, first)) == scene
        assert parse_caption(f"  {scene.caption(verb, first).upper()}\n") == scene


def test_every_object_and_background_comes_back() -> None:
    for values in itertools.product(*ATTRIBUTES.values()):
        scene = Scene((ObjectSpec(**dict(zip(ATTRIBUTES, values))),), "black")
        assert parse_caption(scene.caption()) == scene
    for background in BACKGROUNDS:
        assert parse_caption(Scene((RED,), background).caption()).background == background


def test_sampled_captions_describe_their_scenes_in_known_words() -> None:
    known = set(vocabulary())
    assert len(known) == len(vocabulary())
    seen: set[str] = set()
    for clip in TRAIN + TEST:
        assert parse_caption(clip.caption) == clip.scene
        seen |= set(clip.caption.replace(",", " ,").split())
    assert seen == known


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat on a boat",
        PHRASE,
        f"{PHRASE} on a black background on a white background",
        f"{PHRASE} and {BLUE.phrase()} and {PHRASE} on a black background",
        f"{PHRASE} and {PHRASE} on a black background",
        f"{PHRASE} on a pink background",
        f"{PHRASE} and a dog on a black background",
        f"{PHRASE}ly on a black background",
        f"{PHRASE} and a large blue cross slides up fast on a black background",
    ],
    ids=["empty", "other", "no ground", "two grounds", "three", "one colour", "pink", "dog", "suffix", "two verbs"],
)
def test_other_texts_are_refused_with_an_example(caption: str) -> None:
    with pytest.raises(
        ValueError, match=r"expected one or two objects .* such as 'a small red circle moves left slowly"
    ):
        parse_caption(caption)


def test_clips_depend_on_seed_split_and_index_alone() -> None:
    streams = {(seed, split): sample_clips(20, seed, split) for seed in (0, 1) for split in ("train", "test")}
    for (seed, split), clips in streams.items():
        assert [sample_clip(index, seed, split) for index in reversed(range(20))] == clips[::-1]
        assert sample_clips(5, seed, split, start=7) == clips[7:12]
    drawn = {(clip.caption, clip.starts) for clips in streams.values() for clip in clips}
    assert len(drawn) == 80


def test_the_stream_is_the_one_that_published_numbers_stand_on() -> None:
    """Pinned: a change of these clips changes the prompts of every report."""
    single, pair = sample_clip(0), sample_clip(7, split="test")
    assert single.caption == "a small red square moves down fast on a gray background"
    assert np.allclose(single.starts, [(36.1587, 55.8730)], atol=1e-4)
    assert pair.caption == (
        "on a white background, a large yellow circle slides right slowly and a large red cross slides left fast"
    )
    assert np.allclose(pair.starts, [(51.0553, 13.8156), (20.5055, 31.8777)], atol=1e-4)


def test_objects_are_named_from_left_to_right_and_pairs_come_as_often_as_asked() -> None:
    for share in (0.0, 0.8):
        clips = sample_clips(300, seed=4, pairs=share)
        found = [clip for clip in clips if len(clip.starts) == 2]
        assert len(found) / 300 == pytest.approx(share, abs=0.07)
        assert all(clip.starts[0][1] <= clip.starts[1][1] for clip in found)
    batch = render_parallel(3, seed=4, pairs=0.8)
    assert np.array_equal(batch, render_batch(sample_clips(3, seed=4, pairs=0.8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, "validation"), "split='validation': expected one of train, test"),
        ((-1,), "index=-1, seed=0: both must be at least 0"),
        ((0, -2), "index=0, seed=-2"),
    ],
)
def test_streams_that_do_not_exist_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_clip(*arguments)


def test_held_out_objects_are_never_trained_on_and_always_tested() -> None:
    assert not any(is_held_out(spec) for spec in all_objects(TRAIN))
    assert all(any(is_held_out(spec) for spec in clip.scene.objects) for clip in TEST)


def test_what_is_held_out_are_conjunctions_of_what_is_trained_on() -> None:
    trained = {(spec.shape, spec.colour, spec.size) for spec in all_objects(TRAIN)}
    tested = {(spec.shape, spec.colour, spec.size) for spec in all_objects(TEST) if is_held_out(spec)}
    assert (len(trained), len(tested)) == (40, 8)
    # Any two of the three are seen together in training, all three of a held-out object never.
    for pair in itertools.combinations(range(3), 2):
        assert {tuple(triple[i] for i in pair) for triple in tested} <= {
            tuple(triple[i] for i in pair) for triple in trained
        }


def test_attributes_are_drawn_evenly_and_half_the_clips_have_two_objects() -> None:
    counts = Counter(len(clip.scene.objects) for clip in TRAIN)
    assert set(counts) == {1, 2}
    assert abs(counts[2] / len(TRAIN) - 0.5) < 0.05  # 4 standard deviations
    for name, values in ATTRIBUTES.items():
        drawn = Counter(getattr(spec, name) for spec in all_objects(TRAIN))
        assert set(drawn) == set(values)
        assert max(drawn.values()) < 1.35 * min(drawn.values())
    grounds = Counter(clip.scene.background for clip in TRAIN)
    assert set(grounds) == set(BACKGROUNDS)
    assert max(grounds.values()) < 1.35 * min(grounds.values())
    assert all(len({spec.colour for spec in clip.scene.objects}) == len(clip.scene.objects) for clip in TRAIN + TEST)
    assert {clip.scene.attribute_count for clip in TRAIN} == {6, 11}
