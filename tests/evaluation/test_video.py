"""Files: written whole or not at all, and read back as what was written."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from turbotrain.evaluation import video
from turbotrain.evaluation.video import (
    VideoSink,
    contact_sheet,
    data_uri,
    filmstrip,
    read_video,
    sample_frames,
    webp_bytes,
    write_bytes,
    write_video,
)


def moving_square(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    clip_THWC = np.zeros((frames, height, width, 3), np.uint8)
    clip_THWC[..., 2] = 90
    for t in range(frames):
        clip_THWC[t, 10:30, 4 + 3 * t : 24 + 3 * t] = (250, 120, 10)
    return clip_THWC


@pytest.mark.parametrize(("suffix", "error"), [(".mp4", 4.0), (".gif", 1.0), (".webp", 0.0)])
def test_a_clip_reads_back(tmp_path: Path, suffix: str, error: float) -> None:
    clip_THWC = moving_square()
    assert write_video(tmp_path / f"a{suffix}", clip_THWC, fps=8) == [tmp_path / f"a{suffix}"]
    again_THWC, fps = read_video(tmp_path / f"a{suffix}")
    assert again_THWC.shape == clip_THWC.shape
    assert fps == pytest.approx(8, rel=0.05)
    # yuv420p halves colour resolution: edges of the square differ, the mean hardly does.
    assert np.abs(again_THWC.astype(float) - clip_THWC).mean() <= error


def test_mp4_is_h264_yuv420p_with_its_index_in_front(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving_square(), fps=16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_odd_sizes_are_padded(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving_square(5, 47, 63))
    assert read_video(tmp_path / "a.mp4")[0].shape == (5, 48, 64, 3)


def test_png_is_one_file_a_frame(tmp_path: Path) -> None:
    clip_THWC = moving_square(3)
    files = write_video(tmp_path / "a.png", clip_THWC)
    assert [file.name for file in files] == ["a-0000.png", "a-0001.png", "a-0002.png"]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), clip_THWC)
    assert write_video(tmp_path / "one.png", clip_THWC[:1]) == [tmp_path / "one.png"]


def test_a_clip_that_pauses_keeps_its_length(tmp_path: Path) -> None:
    """gif writers merge equal frames into one that lasts longer; reading repeats it."""
    clip_THWC = moving_square(4)[[0, 1, 1, 1, 2, 3]]
    write_video(tmp_path / "a.gif", clip_THWC, fps=10)
    frames_THWC, fps = read_video(tmp_path / "a.gif")
    assert fps == pytest.approx(10)
    assert np.abs(frames_THWC.astype(float) - clip_THWC).max() <= 1


def test_bad_frames_and_names_say_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"suffix '.avi' names no format; use one of .mp4"):
        write_video(tmp_path / "a.avi", moving_square())
    with pytest.raises(ValueError, match="dtype float64: expected uint8"):
        write_video(tmp_path / "a.mp4", moving_square().astype(float))
    with pytest.raises(ValueError, match=r"shape \(48, 64, 3\): expected \(T, H, W, 3\)"):
        write_video(tmp_path / "a.mp4", moving_square()[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / f"a{suffix}"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(video.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device; choose another output"):
        write_video(target, moving_square(2))
    assert target.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    """A limit on the size of files fails the same writes as a full disk does, also those inside FFmpeg's muxer."""
    noise_THWC = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3)).astype(np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write"):
            write_video(tmp_path / f"a{suffix}", noise_THWC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write"):
        write_bytes(tmp_path / "file" / "a.png", b"x")


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert write_bytes(tmp_path / "ours", b"x").stat().st_mode == plain.stat().st_mode


def test_strips_and_sheets() -> None:
    clip_THWC = moving_square(9)
    assert np.array_equal(sample_frames(clip_THWC, 3), clip_THWC[[0, 4, 8]])
    strip_HWC = filmstrip(clip_THWC, 3, gap=2)
    assert strip_HWC.shape == (48, 3 * 64 + 4, 3)
    assert np.array_equal(strip_HWC[:, 66:130], clip_THWC[4])
    assert contact_sheet([clip_THWC, clip_THWC], 3, gap=2).shape == (98, 196, 3)
    with pytest.raises(ValueError, match="different shapes"):
        contact_sheet([clip_THWC, clip_THWC[:, :40]])


def test_data_uri_holds_the_file() -> None:
    import base64

    data = webp_bytes(moving_square(2))
    head, _, body = data_uri(data, ".webp").partition(",")
    assert head == "data:image/webp;base64"
    assert base64.b64decode(body) == data


def pieces(clip_THWC: np.ndarray) -> list[np.ndarray]:
    return [clip_THWC[:1], clip_THWC[1:5], clip_THWC[5:]]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png"])
def test_pieces_make_the_file_of_the_whole(tmp_path: Path, suffix: str) -> None:
    clip_THWC = moving_square()
    whole = write_video(tmp_path / f"whole{suffix}", clip_THWC, fps=8)
    with VideoSink(tmp_path / f"parts{suffix}", fps=8) as sink:
        for piece_THWC in pieces(clip_THWC):
            sink.write(piece_THWC)
    assert len(sink.files) == len(whole)
    for file, expected in zip(sink.files, whole):
        assert file.name == expected.name.replace("whole", "parts")
        assert file.read_bytes() == expected.read_bytes()


def test_frames_are_encoded_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer asks for the second piece while nobody has made it: what it does with the first cannot wait for it."""
    asked = threading.Event()
    encode = video.encode_mp4

    def observed(path: Path, arriving: Iterable[np.ndarray], fps: float) -> None:
        def each() -> Iterator[np.ndarray]:
            for index, piece_THWC in enumerate(arriving):
                yield piece_THWC
                if index == 0:
                    asked.set()

        encode(path, each(), fps)

    monkeypatch.setattr(video, "encode_mp4", observed)
    with VideoSink(tmp_path / "a.mp4") as sink:
        sink.write(moving_square(3))
        assert asked.wait(timeout=30)
        sink.write(moving_square(2))
    assert len(read_video(tmp_path / "a.mp4")[0]) == 5


def test_a_video_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:

    def decode(sink: VideoSink) -> None:
        sink.write(moving_square(3))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), VideoSink(tmp_path / "a.mp4") as sink:
        decode(sink)
    with pytest.raises(ValueError, match="frames are missing: a video has at least one"), VideoSink(tmp_path / "a.mp4"):
        pass
    with pytest.raises(ValueError, match=r"frames of \(40, 64\) follow frames of \(48, 64\)"):
        write_video(tmp_path / "a.mp4", [moving_square(3), moving_square(3, 40)])
    assert list(tmp_path.iterdir()) == []


def test_a_sink_raises_what_writing_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write"), VideoSink(tmp_path / "file" / "a.mp4") as sink:
        sink.write(moving_square(2))
    with pytest.raises(ValueError, match=r"suffix '.avi' names no format"):
        VideoSink(tmp_path / "a.avi")
