"""Pictures as people have them: turned, transparent, grey, tiny, huge, damaged."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from turbotrain.images import WORKING_PIXELS, cover, load_image

RED, WHITE = (250, 10, 20), (255, 255, 255)


def corner(height: int = 8, width: int = 12) -> np.ndarray:
    """Black, with a red top left corner."""
    image_HWC = np.zeros((height, width, 3), np.uint8)
    image_HWC[: height // 2, : width // 2] = RED
    return image_HWC


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "gif", "tiff"])
def test_files_of_common_formats(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(corner()).save(tmp_path / f"a.{suffix}", **options)
    for source in (tmp_path / f"a.{suffix}", str(tmp_path / f"a.{suffix}")):
        assert np.array_equal(np.asarray(load_image(source)), corner())


def test_pil_images_and_arrays_are_left_as_they_were() -> None:
    given = Image.fromarray(corner())
    assert np.array_equal(np.asarray(load_image(given)), corner())
    assert np.array_equal(np.asarray(load_image(corner())), corner())
    grey = Image.new("L", (4, 4), 7)
    grey.getexif()[ExifTags.Base.Orientation] = 6
    load_image(grey)
    assert (grey.mode, grey.size, grey.getexif()[ExifTags.Base.Orientation]) == ("L", (4, 4), 6)


TURNS = {  # EXIF orientation: how a picture that is upright has to be stored
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[::-1],
    7: lambda image: image.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda image: image.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
def test_exif_turns_the_picture_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = corner(32, 64)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](upright)))
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    loaded = np.asarray(load_image(tmp_path / f"a.{suffix}"))
    assert loaded.shape == upright.shape
    assert np.abs(loaded.astype(int) - upright).max() <= (4 if suffix == "jpg" else 0)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    alpha = np.full((4, 4, 4), 255, np.uint8)
    alpha[:, :, :3] = RED
    alpha[:2, :, 3] = 0  # what lies under it is red, and must not show
    alpha[2, :, 3] = 128
    Image.fromarray(alpha).save(tmp_path / "rgba.png")
    loaded = np.asarray(load_image(tmp_path / "rgba.png"))
    assert (loaded[:2] == WHITE).all()
    assert (loaded[3] == RED).all()
    assert np.abs(loaded[2].astype(int) - (np.array(RED) + WHITE) / 2).max() <= 1
    grey_alpha = Image.fromarray(alpha).convert("LA")
    assert (np.asarray(load_image(grey_alpha))[:2] == WHITE).all()
    palette = Image.fromarray(corner()).quantize(4)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    loaded = np.asarray(load_image(tmp_path / "palette.png"))
    assert (loaded[0, 0] == WHITE).all()
    assert (loaded[-1, -1] == 0).all()
    Image.fromarray(corner()).save(tmp_path / "key.png", transparency=RED)  # one colour is transparent
    assert (np.asarray(load_image(tmp_path / "key.png"))[0, 0] == WHITE).all()


def test_grey_pictures_keep_their_levels(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "8.png")
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "16.tiff")
    for name in ("8.png", "16.png", "16.tiff"):
        loaded = np.asarray(load_image(tmp_path / name))
        assert (loaded == levels[:, :, None]).all(), name
    Image.fromarray(levels > 127).save(tmp_path / "1.png")
    assert (np.asarray(load_image(tmp_path / "1.png"))[:, :, 1] == np.where(levels > 127, 255, 0)).all()
    with pytest.raises(ValueError, match="floating point pixels have no known range"):
        load_image(Image.fromarray(levels.astype(np.float32)))


def test_one_pixel_fills_a_frame(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "1.png")
    frame_HWC = cover(load_image(tmp_path / "1.png"), 64, 96)
    assert frame_HWC.shape == (64, 96, 3)
    assert (frame_HWC == RED).all()


def test_a_hundred_megapixels_are_read_quietly_and_averaged_down(
    tmp_path: Path, work_seconds: Callable[[], float]
) -> None:
    side = 10_000
    large = Image.new("L", (side, side), 40)
    large.paste(200, (0, 0, side // 2, side // 2))
    large.save(tmp_path / "large.png", compress_level=1)
    start = work_seconds()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(tmp_path / "large.png")
    assert work_seconds() - start < 10  # measured 0.7 s
    assert loaded.size == (side // 3 + 1, side // 3 + 1)
    assert loaded.width * loaded.height <= WORKING_PIXELS
    assert (loaded.getpixel((0, 0)), loaded.getpixel((3000, 3000))) == ((200, 200, 200), (40, 40, 40))


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"not a readable image file.*more than 178 megapixels"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_damaged_files_are_refused_or_read(tmp_path: Path, suffix: str) -> None:
    """Whatever the damage, the answer is a picture or a ValueError."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    damaged = tmp_path / f"damaged.{suffix}"
    chance = random.Random(0)
    refused = 0
    for trial in range(60):
        data = bytearray(whole)
        if trial % 2:
            del data[chance.randrange(len(data)) :]
        else:
            for _ in range(4):
                data[chance.randrange(min(len(data), 200))] = chance.randrange(256)
        damaged.write_bytes(data)
        with contextlib.suppress(ValueError):
            load_image(damaged)
            continue
        refused += 1
    assert refused > 20


@pytest.mark.parametrize("content", [b"", b"not an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0" * 100])
def test_what_is_no_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.png': not a readable image file"):
        load_image(tmp_path / "a.png")


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone.png': not a readable image file .No such file or directory"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"not a readable image file .Is a directory"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match=r"not a readable image file .*null"):
        load_image("a\0.png")
    with pytest.raises(ValueError, match="image = 3: expected a path, a PIL image or a uint8 array"):
        load_image(3)
    for array in (corner().astype(float), corner()[:, :, 0], np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 \(height, width, 3\)"):
            load_image(array)


def test_covering_keeps_proportions_and_the_centre() -> None:
    image_HWC = np.zeros((40, 120, 3), np.uint8)
    image_HWC[:, 40:80] = 255
    assert (cover(Image.fromarray(image_HWC), 40, 40) == 255).mean() > 0.97
    assert cover(Image.fromarray(image_HWC), 40, 120).tolist() == image_HWC.tolist()
    grown = cover(Image.fromarray(image_HWC), 100, 64)
    assert grown.shape == (100, 64, 3)
    assert (grown == 255).all()
