"""Frames in, files out: mp4 (h264), gif, png and webp, written whole or not at all, and the strips that reports show.

Every writer goes through a temporary file beside the destination and an atomic rename, so that a full disk, a lost permission or
a kill leaves either the old file or the new one.

Shapes: T frames, H height, W width, C = 3 channels (RGB); frames are uint8.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from turbotrain.checkpoint.atomic import new_file
from turbotrain.evaluation.mp4 import encode_mp4

SUFFIXES = (".mp4", ".gif", ".png", ".webp")
MIME = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png", ".webp": "image/webp"}
# Up to this many pixels a clip is stored without loss in webp: chroma subsampling is visible when 64-pixel clips are magnified.
_LOSSLESS_PIXELS = 1 << 20


def write_video(
    path: str | os.PathLike[str], frames_THWC: np.ndarray | Iterable[np.ndarray], fps: float = 16.0
) -> list[Path]:
    """Writes a clip in the format that the suffix of `path` names; returns the files written.

    The clip comes whole, or in pieces (t, H, W, 3) that follow one another: mp4 encodes each as it comes. `.mp4` is h264 in
    yuv420p with its index in front; odd sizes are padded by repeating the last row or column, because that pixel format has
    even sizes only. `.gif` and `.webp` are animated. `.png` is one file for one frame, else `name-0000.png`,
    `name-0001.png`, ...

    Raises:
        ValueError: an unknown suffix, frames that are not uint8 (T, H, W, 3), pieces of different sizes, or none.
        OSError: the destination cannot be written (read-only, full disk); nothing is left behind.
    """
    path = Path(path)
    check_suffix(path)
    if not fps > 0:
        raise ValueError(f"fps = {fps}: frames per second must be above 0")
    suffix = path.suffix.lower()
    pieces = _checked_pieces([frames_THWC] if isinstance(frames_THWC, np.ndarray) else frames_THWC)
    if suffix == ".mp4":
        first_THWC = next(pieces)  # what is wrong with the frames shows before a file is made
        with new_file(path) as temporary:
            encode_mp4(temporary, itertools.chain([first_THWC], pieces), fps)
        return [path]
    frames_THWC = np.concatenate(list(pieces))
    if suffix == ".png":
        return _write_pngs(path, frames_THWC)
    with new_file(path) as temporary:
        temporary.write_bytes(_animation(frames_THWC, fps, suffix))
    return [path]


class VideoSink:
    """A video file in the making: `write` takes frames and returns at once, a thread encodes them.

        with VideoSink(path, fps) as sink:
            for frames_THWC in decoder:
                sink.write(frames_THWC)

    The block's end waits for the file, and raises what writing it raised; `files` then lists what was written. A block that
    raises leaves no file.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = 16.0) -> None:
        """Raises ValueError as `write_video` does for a suffix or a frame rate."""
        self.path = Path(path)
        check_suffix(self.path)
        self.fps = fps
        self.files: list[Path] = []
        self._arriving: queue.SimpleQueue[np.ndarray | Exception | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name=f"writing {self.path.name}", daemon=True)

    def write(self, frames_THWC: np.ndarray) -> None:
        """Frames (t, H, W, 3) that follow those before; they must not change afterwards."""
        self._arriving.put(frames_THWC)

    def __enter__(self) -> VideoSink:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._arriving.put(None if error is None else InterruptedError("the video's frames ended early"))
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _write(self) -> None:
        try:
            self.files = write_video(self.path, self._pieces(), self.fps)
        except Exception as error:  # raised again where the frames come from
            self._error = error

    def _pieces(self) -> Iterator[np.ndarray]:
        while (piece := self._arriving.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """Reads back what `write_video` wrote (or any file PyAV or Pillow knows): (frames_THWC uint8, frames per second).

    A gif or webp repeats a frame where its duration says so, so that a still clip keeps its length.

    Raises:
        ValueError: the file holds no frames.
    """
    path = Path(path)
    if path.suffix.lower() in (".gif", ".webp", ".png"):
        return _read_animation(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        fps = float(stream.average_rate or 0)
    if not frames:
        raise ValueError(f"{path}: no video frames inside")
    return np.stack(frames), fps


def check_suffix(path: Path) -> None:
    """Raises ValueError unless the suffix names a format that `write_video` knows."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"output = {str(path)!r}: suffix {path.suffix!r} names no format; use one of {', '.join(SUFFIXES)}"
        )


def check_frames(frames_THWC: np.ndarray) -> np.ndarray:
    """Returns the frames as an array; raises ValueError unless they are uint8 (T, H, W, 3) with T, H, W > 0."""
    frames_THWC = np.asarray(frames_THWC)
    if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or 0 in frames_THWC.shape:
        raise ValueError(f"frames have shape {tuple(frames_THWC.shape)}: expected (T, H, W, 3) with nothing empty")
    if frames_THWC.dtype != np.uint8:
        raise ValueError(
            f"frames have dtype {frames_THWC.dtype}: expected uint8 (0 to 255); scale and round them first"
        )
    return frames_THWC


def _checked_pieces(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    size: tuple[int, ...] | None = None
    for piece in pieces:
        piece_THWC = check_frames(piece)
        size = size or piece_THWC.shape[1:]
        if piece_THWC.shape[1:] != size:
            raise ValueError(f"frames of {piece_THWC.shape[1:3]} follow frames of {size[:2]}: a video has one size")
        yield piece_THWC
    if size is None:
        raise ValueError("frames are missing: a video has at least one")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Atomic replacement of a whole file, for reports and strips. Raises OSError as `new_file` does."""
    path = Path(path)
    with new_file(path) as temporary:
        temporary.write_bytes(data)
    return path


def write_image(path: str | os.PathLike[str], image_HWC: np.ndarray) -> Path:
    """Writes a uint8 (H, W, 3) image as PNG, whole or not at all. Raises OSError as `new_file` does."""
    return write_bytes(path, png_bytes(image_HWC))


def sample_frames(frames_THWC: np.ndarray, count: int) -> np.ndarray:
    """`count` frames evenly spread from the first to the last (fewer when the clip is shorter)."""
    frames_THWC = check_frames(frames_THWC)
    count = min(max(1, count), len(frames_THWC))
    return frames_THWC[np.linspace(0, len(frames_THWC) - 1, count).round().astype(int)]


def filmstrip(frames_THWC: np.ndarray, count: int = 6, gap: int = 2, background: int = 255) -> np.ndarray:
    """One image (H, W', 3) with `count` frames of the clip side by side, `gap` pixels of grey level `background` between them."""
    frames = sample_frames(frames_THWC, count)
    separator = np.full((frames.shape[1], gap, 3), background, np.uint8)
    pieces: list[np.ndarray] = []
    for frame_HWC in frames:
        pieces += [frame_HWC, separator]
    return np.concatenate(pieces[:-1] if len(pieces) > 1 else pieces, axis=1)


def contact_sheet(clips: Sequence[np.ndarray], count: int = 6, gap: int = 4, background: int = 255) -> np.ndarray:
    """Filmstrips of several clips of one size under one another: (H', W', 3) uint8.

    Raises:
        ValueError: no clips, or clips of different sizes.
    """
    if not clips:
        raise ValueError("contact_sheet needs at least one clip, got none")
    strips = [filmstrip(clip, count, gap, background) for clip in clips]
    shapes = {strip.shape for strip in strips}
    if len(shapes) > 1:
        raise ValueError(f"clips give strips of different shapes {sorted(shapes)}: use clips of one size and length")
    separator = np.full((gap, strips[0].shape[1], 3), background, np.uint8)
    pieces: list[np.ndarray] = []
    for strip in strips:
        pieces += [strip, separator]
    return np.concatenate(pieces[:-1], axis=0)


def png_bytes(image_HWC: np.ndarray) -> bytes:
    """The image (H, W, 3), or (H, W, 4) with transparency, uint8, as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HWC)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def webp_bytes(frames_THWC: np.ndarray, fps: float = 16.0) -> bytes:
    """The clip as an animated webp: without loss when it is small, at high quality when it is not."""
    return _animation(check_frames(frames_THWC), fps, ".webp")


def data_uri(data: bytes, suffix: str) -> str:
    """`data:` address of a file with that suffix, for documents that must not refer to other files."""
    return f"data:{MIME[suffix.lower()]};base64,{base64.b64encode(data).decode('ascii')}"


def _animation(frames_THWC: np.ndarray, fps: float, suffix: str) -> bytes:
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames_THWC]
    duration = max(1, round(1000 / fps))  # ms a frame
    buffer = io.BytesIO()
    if suffix == ".gif":
        # One palette a frame and no dithering: dither patterns would crawl from frame to frame.
        images = [image.quantize(256, dither=Image.Dither.NONE) for image in images]
        images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0, disposal=1)
    else:
        lossless = frames_THWC.size // 3 <= _LOSSLESS_PIXELS
        options = {"lossless": True, "quality": 60, "method": 4} if lossless else {"quality": 88, "method": 4}
        images[0].save(buffer, "WEBP", save_all=True, append_images=images[1:], duration=duration, loop=0, **options)
    return buffer.getvalue()


def _write_pngs(path: Path, frames_THWC: np.ndarray) -> list[Path]:
    if len(frames_THWC) == 1:
        return [write_image(path, frames_THWC[0])]
    targets = [path.with_name(f"{path.stem}-{index:04d}{path.suffix}") for index in range(len(frames_THWC))]
    with contextlib.ExitStack() as stack:  # all are encoded before the first takes its name
        temporaries = [stack.enter_context(new_file(target)) for target in targets]
        for temporary, frame_HWC in zip(temporaries, frames_THWC):
            temporary.write_bytes(png_bytes(frame_HWC))
    return targets


def _read_animation(path: Path) -> tuple[np.ndarray, float]:
    frames: list[np.ndarray] = []
    durations: list[int] = []
    with Image.open(path) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(int(image.info.get("duration", 0)))
    unit = min((duration for duration in durations if duration > 0), default=0)
    repeats = [max(1, round(duration / unit)) if unit else 1 for duration in durations]
    return np.repeat(np.stack(frames), repeats, axis=0), 1000.0 / unit if unit else 0.0
