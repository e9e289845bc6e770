"""Clips out of video files: decoded by PyAV, at the frame rate, size and length that a network is trained with.

Legend: T frames, H, W pixels, C = 3 colours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from turbotrain.images import cover
from turbotrain.model.variants import Variant

SAME_ASPECT = 0.01  # aspect ratios this near (in their logarithms) are one
_EARLY = 1e-6  # seconds: time stamps are rounded


class BadVideo(ValueError):
    """A file from which no clip can be taken: which, and why."""


@dataclass(frozen=True, order=True)
class Bucket:
    """One size and length of clips: every batch of training holds one."""

    width: int
    height: int
    frames: int

    @classmethod
    def parse(cls, text: str, variant: Variant) -> Bucket:
        """`WIDTHxHEIGHTxFRAMES`. Raises ValueError where the variant's VAE cannot code it."""
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        if not found:
            raise ValueError(f"bucket {text!r}: say WIDTHxHEIGHTxFRAMES, for example 832x480x81")
        bucket = cls(*map(int, found.groups()))
        variant.latent_shape(bucket.frames, bucket.height, bucket.width)
        return bucket

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


def nearest_size(buckets: Sequence[Bucket], width: int, height: int) -> list[Bucket]:
    """The buckets of one size that suit a picture, longest first: of the nearest aspect ratio, the largest that need not be
    scaled up, or the smallest."""

    def distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.width / bucket.height) - math.log(width / height))

    least = min(map(distance, buckets))
    alike = [bucket for bucket in buckets if distance(bucket) <= least + SAME_ASPECT]
    covered = [bucket for bucket in alike if bucket.width <= width and bucket.height <= height]
    area = max(b.width * b.height for b in covered) if covered else min(b.width * b.height for b in alike)
    chosen = [bucket for bucket in alike if bucket.width * bucket.height == area]
    return sorted(
        (b for b in chosen if (b.width, b.height) == (chosen[0].width, chosen[0].height)), key=lambda b: -b.frames
    )


def read_clip(
    path: Path, buckets: Sequence[Bucket], fps: float, start: float = 0.0
) -> tuple[Bucket, NDArray[np.uint8]]:
    """The clip that begins `start` seconds into a video, as long as the longest bucket of its size that it fills.

    Returns:
        The bucket, and frames uint8 (T, H, W, C) of its size: at every 1/fps the frame that is on screen, scaled to cover the
        bucket's size and cropped at the centre.

    Raises:
        BadVideo: unreadable, without frames, or shorter than the shortest bucket of its size.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadVideo(f"{path}: no video stream inside")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if start > 0:
                container.seek(int(start * av.time_base))  # to the key frame before it
            rate = float(stream.average_rate or fps)
            pictures = _timed(container.decode(stream), rate, start)
            first = next(pictures, None)
            if first is None:
                raise BadVideo(f"{path}: no frames from second {start:g} on")
            choice = nearest_size(buckets, *first[1].size)
            width, height = choice[0].width, choice[0].height
            frames: list[np.ndarray] = []
            for picture in _sampled(first, pictures, fps, 1 / rate, choice[0].frames):
                # A still passage shows one picture many times: scaled once.
                frames.append(frames[-1] if picture is None else cover(picture, height, width))
    except av.FFmpegError as error:
        raise BadVideo(f"{path}: not a readable video ({error.strerror or error})") from error
    fitting = next((bucket for bucket in choice if bucket.frames <= len(frames)), None)
    if fitting is None:
        raise BadVideo(
            f"{path}: {len(frames)} frames at {fps:g} a second from second {start:g} on, the shortest bucket of {width}x{height} "
            f"takes {choice[-1].frames}"
        )
    return fitting, np.stack(frames[: fitting.frames])


def _timed(decoded: Iterable[av.VideoFrame], rate: float, start: float) -> Iterator[tuple[float, Image.Image]]:
    """(seconds from the first one on, upright picture) of each frame from `start` on."""
    zero: float | None = None
    for number, frame in enumerate(decoded):
        time = number / rate if frame.time is None else frame.time
        if time < start - _EARLY:
            continue
        zero = time if zero is None else zero
        picture = frame.to_image()
        # Phones store what they filmed upright lying on its side, with a note.
        yield time - zero, picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _sampled(
    first: tuple[float, Image.Image],
    later: Iterator[tuple[float, Image.Image]],
    fps: float,
    last_seconds: float,
    most: int,
) -> Iterator[Image.Image | None]:
    """At k / fps the picture that is on screen, for as long as there is one; None: the same as before."""
    shown, picture = first[0], first[1]
    following = next(later, None)
    is_new = True
    for k in range(most):
        while following is not None and following[0] <= k / fps + _EARLY:
            (shown, picture), following, is_new = following, next(later, None), True
        if following is None and k / fps >= shown + last_seconds - _EARLY:
            return
        yield picture if is_new else None
        is_new = False
