"""Clips from video files: which frames, how they are cropped, which bucket."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from turbotrain.data.videos import BadVideo, Bucket, nearest_size, read_clip
from turbotrain.evaluation.video import write_video
from turbotrain.model.variants import VARIANTS

TOLERANCE = 3  # grey levels that h264 loses on a flat picture


def greys(path: Path, count: int, fps: float) -> Path:
    """Frame k is grey 8 k."""
    levels = (8 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    write_video(path, np.broadcast_to(levels, (count, 32, 48, 3)), fps)
    return path


def shown(path: Path, frames: int, fps: float, start: float = 0.0) -> list[int]:
    """Which frame of the file each frame of the clip is."""
    _, clip_THWC = read_clip(path, [Bucket(48, 32, frames)], fps, start)
    level = clip_THWC.astype(float).mean(axis=(1, 2, 3))
    assert np.abs(level - 8 * (level / 8).round()).max() < TOLERANCE
    return (level / 8).round().astype(int).tolist()


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_frames_are_those_on_screen(suffix: str, tmp_path: Path) -> None:
    # gif counts in hundredths of a second: 25 and 12.5 frames a second are exact in both.
    path = greys(tmp_path / f"a{suffix}", 24, 25)
    assert shown(path, 21, 25) == list(range(21))
    assert shown(path, 9, 12.5) == [2 * k for k in range(9)]
    assert shown(path, 13, 50) == [k // 2 for k in range(13)]
    assert shown(path, 9, 10) == [int(2.5 * k) for k in range(9)]
    assert shown(path, 5, 25, start=0.4) == [10, 11, 12, 13, 14]


def test_a_clip_ends_with_its_video(tmp_path: Path) -> None:
    path = greys(tmp_path / "a.mp4", 24, 24)
    buckets = [Bucket(48, 32, n) for n in (17, 13, 9)]
    assert read_clip(path, buckets, 16)[0].frames == 13  # one second: 16 frames
    assert read_clip(path, buckets, 24)[0].frames == 17
    with pytest.raises(BadVideo, match="8 frames at 8 a second from second 0 on, the shortest bucket of 48x32 takes 9"):
        read_clip(path, buckets, 8)
    with pytest.raises(BadVideo, match="no frames from second 5 on"):
        read_clip(path, buckets, 8, start=5)


def test_the_centre_is_kept(tmp_path: Path) -> None:
    """A picture twice as wide as the bucket: the outer quarters, black, are cropped."""
    frames_THWC = np.zeros((5, 64, 192, 3), np.uint8)
    frames_THWC[:, :, 48:144] = 200
    write_video(tmp_path / "a.mp4", frames_THWC, 16)
    _, clip_THWC = read_clip(tmp_path / "a.mp4", [Bucket(48, 32, 5)], 16)
    assert clip_THWC.shape == (5, 32, 48, 3)
    assert np.abs(clip_THWC[:, :, 2:-2].astype(int) - 200).max() < TOLERANCE


def test_phones_film_upright(tmp_path: Path) -> None:
    """The file's matrix says: turn clockwise. What is at its left edge belongs to the top."""
    frames_THWC = np.zeros((5, 32, 64, 3), np.uint8)
    frames_THWC[:, :, :32] = 200
    path = tmp_path / "a.mp4"
    write_video(path, frames_THWC, 16)
    data = path.read_bytes()
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    track = data.index(b"tkhd")
    at = data.index(identity, track)
    path.write_bytes(data[:at] + clockwise + data[at + len(clockwise) :])
    bucket, clip_THWC = read_clip(path, [Bucket(64, 32, 5), Bucket(32, 64, 5)], 16)
    assert bucket == Bucket(32, 64, 5)
    assert np.abs(clip_THWC[:, :30].astype(int) - 200).max() < TOLERANCE
    assert clip_THWC[:, 34:].max() < TOLERANCE


def test_buckets_by_aspect_and_size() -> None:
    sizes = [
        Bucket(832, 480, 81),
        Bucket(832, 480, 49),
        Bucket(480, 832, 81),
        Bucket(1280, 720, 81),
        Bucket(640, 640, 81),
    ]
    assert nearest_size(sizes, 1920, 1080) == [Bucket(1280, 720, 81)]
    assert nearest_size(sizes, 1080, 1920) == [Bucket(480, 832, 81)]
    assert nearest_size(sizes, 500, 520) == [Bucket(640, 640, 81)]
    wide = [Bucket(832, 480, 81), Bucket(832, 480, 49), Bucket(416, 240, 81), Bucket(1664, 960, 81)]
    assert nearest_size(wide, 900, 520) == [Bucket(832, 480, 81), Bucket(832, 480, 49)]
    assert nearest_size(wide, 1664, 960) == [Bucket(1664, 960, 81)]
    assert nearest_size(wide, 100, 58) == [Bucket(416, 240, 81)]


def test_bucket_names() -> None:
    variant = VARIANTS["wan2.1_t2v_1.3b"]
    assert str(Bucket.parse("832x480x81", variant)) == "832x480x81"
    for text, words in (("832x480", "WIDTHxHEIGHTxFRAMES"), ("832x480x80", "frames=80"), ("840x480x81", "width=840")):
        with pytest.raises(ValueError, match=words):
            Bucket.parse(text, variant)
