"""Sizes by name, by aspect and by image: published sizes where there are some, the same area elsewhere."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from turbotrain.model.variants import VARIANTS
from turbotrain.sizes import RESOLUTIONS, video_size

WAN, LARGE, SMALL_WORLD = VARIANTS["wan2.1_t2v_1.3b"], VARIANTS["wan2.2_ti2v_5b"], VARIANTS["shapes"]


@pytest.mark.parametrize(
    ("resolution", "aspect", "size"),
    [
        # TurboDiffusion's table and Wan's own sizes, as width x height
        ("480p", "16:9", (832, 480)),
        ("480p", "9:16", (480, 832)),
        ("480p", "4:3", (640, 480)),
        ("480p", "3:4", (480, 640)),
        ("480p", "1:1", (640, 640)),
        ("720p", "16:9", (1280, 720)),
        ("720p", "9:16", (720, 1280)),
        ("720p", "4:3", (960, 720)),
        ("720p", "3:4", (720, 960)),
        ("720p", "1:1", (960, 960)),
        ("720p", "32:18", (1280, 720)),
        ("720p", None, (1280, 720)),
        ("580p", None, (1024, 576)),
        (None, "1:1", (640, 640)),
        (None, None, (832, 480)),
    ],
)
def test_published_sizes(resolution: str | None, aspect: str | None, size: tuple[int, int]) -> None:
    assert video_size(WAN, resolution, aspect) == size[::-1]


def test_5b_has_larger_cells() -> None:
    """Its published 720p is 1280x704; every other size is made of whole cells too."""
    assert video_size(LARGE) == video_size(LARGE, "720p") == video_size(LARGE, "720p", "16:9") == (704, 1280)
    assert video_size(LARGE, "720p", "9:16") == (1280, 704)
    assert video_size(LARGE, "480p") == (480, 832)
    assert video_size(LARGE, "720p", image=(1080, 1920)) == (704, 1248)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "shapes"])
def test_every_size_is_one_that_the_variant_can_make(name: str) -> None:
    variant = VARIANTS[name]
    aspects = ["16:9", "9:16", "4:3", "3:4", "1:1", "21:9", "2.39:1", "3:2", "4:1", "1:4"]
    for resolution, aspect in itertools.product(RESOLUTIONS, aspects):
        height, width = video_size(variant, resolution, aspect)
        variant.latent_shape(variant.frames, height, width)
        wide, high = video_size(WAN, resolution)
        assert height * width <= 1.03 * wide * high  # the published squares are 2.6% larger


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((1080, 1920), (464, 832)),
        ((1920, 1080), (832, 464)),
        ((3000, 4000), (544, 720)),
        ((1, 1), (624, 624)),
        ((10, 40), (304, 1248)),
    ],
)
def test_adaptive_keeps_the_area_and_nearly_the_aspect(image: tuple[int, int], size: tuple[int, int]) -> None:
    assert video_size(WAN, image=image) == video_size(WAN, "480p", "adaptive", image=image) == size
    height, width = size
    assert 0.9 * 480 * 832 < height * width <= 480 * 832
    assert abs(width / height / (image[1] / image[0]) - 1) < 0.05


def test_named_sizes_win_over_the_image() -> None:
    assert video_size(WAN, "480p", "1:1", image=(1080, 1920)) == (640, 640)
    assert video_size(WAN, height=64, width=128, image=(1080, 1920)) == (64, 128)


def test_the_small_world_has_its_own_area() -> None:
    assert video_size(SMALL_WORLD, image=(30, 60)) == (40, 88)
    assert video_size(SMALL_WORLD, aspect="2:1") == (40, 88)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"resolution": "1080p"}, "resolution='1080p': choose one of 480p, 580p, 720p, or say width and height"),
        ({"aspect": "wide"}, "aspect='wide': say W:H, for example 16:9, 1:1 or 3:4, or adaptive"),
        ({"aspect": "16:0"}, "aspect='16:0': say W:H"),
        ({"aspect": "1:2:3"}, "aspect='1:2:3': say W:H"),
        ({"aspect": "-16:9"}, "aspect='-16:9': more extreme than 4:1"),
        ({"aspect": "10:1"}, "aspect='10:1': more extreme than 4:1; choose one between 1:4 and 4:1"),
        ({"aspect": "adaptive"}, "aspect='adaptive': is the image's own, and there is no image"),
        ({"resolution": "480p", "width": 640}, "resolution='480p': width and height say the size already"),
        ({"aspect": "1:1", "height": 640}, "aspect='1:1': width and height say the size already"),
        ({"image": (1, 5000)}, "image=5000x1 pixels: more extreme than 4:1; crop it, or say aspect=W:H"),
    ],
)
def test_bad_sizes_say_what_is_allowed(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        video_size(WAN, **said)


def test_the_small_world_has_no_named_resolutions() -> None:
    with pytest.raises(ValueError, match="resolution='480p': variant shapes makes 64x64 pixels; say width and height"):
        video_size(SMALL_WORLD, "480p")


def test_the_teachers_shift_follows_the_size() -> None:
    """2.1 I2V alone has two: 3 at 480p, 5 at 720p, in any aspect (formats.md 10)."""
    image_to_video = VARIANTS["wan2.1_i2v_14b"]
    for aspect in ("16:9", "9:16", "4:3", "1:1"):
        assert image_to_video.shift_at(*video_size(image_to_video, "480p", aspect)) == 3.0
        assert image_to_video.shift_at(*video_size(image_to_video, "720p", aspect)) == 5.0
        assert WAN.shift_at(*video_size(WAN, "720p", aspect)) == 5.0
