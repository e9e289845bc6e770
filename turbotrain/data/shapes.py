"""The shapes world: captions from a small grammar and the clips that show them, deterministic from (seed, index).

One or two coloured shapes move evenly over a plain background for 13 frames of 64x64 pixels at 8 frames a second; a clip of
another length shows the same way in more or fewer steps. A caption
names, per object from left to right, size, colour, shape, direction and speed, and the background; it leaves the start
position free, which is what `turbotrain.evaluation.judge.coverage` measures. Eight of the 48 (shape, colour, size) triples
never occur in the training split: every shape is still seen in every colour and every size, but not in that conjunction.
Each test clip shows at least one of them.

Numpy only: the configuration check may import this without paying for torch. Shape suffixes as in `shapes_render`.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from turbotrain.data.shapes_render import (
    BACKGROUNDS,
    COLOURS,
    CORNERS,
    DIRECTIONS,
    EXTENTS,
    FPS,
    FRAMES,
    SHAPES,
    SIZE,
    SIZES,
    SPEEDS,
    draw,
    positions,
)

__all__ = [
    "ATTRIBUTES",
    "FPS",
    "FRAMES",
    "GRID",
    "SIZE",
    "Clip",
    "ObjectSpec",
    "Scene",
    "is_held_out",
    "parse_caption",
    "render_batch",
    "render_parallel",
    "sample_clip",
    "sample_clips",
    "vocabulary",
]

GRID = 4  # start positions are counted on a GRID x GRID raster
VERBS = ("moves", "slides")
SPLITS = ("train", "test")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
}

_GAP = 2.0  # pixels that stay free between two objects
_TRIES = 60


@dataclass(frozen=True)
class ObjectSpec:
    """What a caption says of one object."""

    shape: str
    colour: str
    size: str
    direction: str
    speed: str

    def phrase(self, verb: str = "moves") -> str:
        return f"a {self.size} {self.colour} {self.shape} {verb} {self.direction} {self.speed}"


@dataclass(frozen=True)
class Scene:
    """Everything a caption says: one or two objects (of different colours) and the background."""

    objects: tuple[ObjectSpec, ...]
    background: str

    def caption(self, verb: str = "moves", background_first: bool = False) -> str:
        objects = " and ".join(spec.phrase(verb) for spec in self.objects)
        where = f"on a {self.background} background"
        return f"{where}, {objects}" if background_first else f"{objects} {where}"

    @property
    def attribute_count(self) -> int:
        return len(ATTRIBUTES) * len(self.objects) + 1


@dataclass(frozen=True)
class Clip:
    """One caption with its scene and the objects' first centres (y, x) in pixels; frames are drawn on first use."""

    index: int
    caption: str
    scene: Scene
    starts: tuple[tuple[float, float], ...]

    @cached_property
    def frames_THWC(self) -> NDArray[np.uint8]:
        return render_batch([self])[0]


def is_held_out(spec: ObjectSpec) -> bool:
    """Whether this (shape, colour, size) is kept out of training: one colour for each of the eight (shape, size) pairs."""
    shape, size = SHAPES.index(spec.shape), list(SIZES).index(spec.size)
    return (list(COLOURS).index(spec.colour) - shape - 3 * size) % len(COLOURS) == 0


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that a caption can contain, in a fixed order."""
    words: list[str] = ["a", "and", "on", "background", ",", *VERBS, *BACKGROUNDS]
    for values in ATTRIBUTES.values():
        words.extend(values)
    return tuple(dict.fromkeys(words))


def _alternatives(values: Sequence[str]) -> str:
    return "(" + "|".join(values) + ")"


_OBJECT = re.compile(
    r"\ba "
    + " ".join(_alternatives(ATTRIBUTES[name]) for name in ("size", "colour", "shape"))
    + f" (?:{'|'.join(VERBS)}) "
    + " ".join(_alternatives(ATTRIBUTES[name]) for name in ("direction", "speed"))
    + r"\b"
)
_BACKGROUND = re.compile(r"\bon a " + _alternatives(list(BACKGROUNDS)) + r" background\b")


def parse_caption(caption: str) -> Scene:
    """The scene that a caption of the grammar describes; ValueError for any other text."""
    text = " ".join(caption.lower().split())
    found = _OBJECT.findall(text)
    where = _BACKGROUND.findall(text)
    objects = tuple(
        ObjectSpec(shape=shape, colour=colour, size=size, direction=direction, speed=speed)
        for size, colour, shape, direction, speed in found
    )
    if len(objects) in (1, 2) and len(where) == 1 and len({spec.colour for spec in objects}) == len(objects):
        scene = Scene(objects, where[0])
        if text in {scene.caption(verb, first) for verb in VERBS for first in (False, True)}:
            return scene
    example = ObjectSpec("circle", "red", "small", "left", "slowly").phrase()
    raise ValueError(
        f"caption={caption!r}: expected one or two objects of different colours and one background, such as "
        f"'{example} on a black background' (words: {', '.join(vocabulary())})"
    )


def sample_clip(index: int, seed: int = 0, split: str = "train", pairs: float = 0.5) -> Clip:
    """Clip number `index` of a split's endless, seeded stream. Any index may be asked for, in any order.

    pairs: the share of clips with two objects.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if index < 0 or seed < 0:
        raise ValueError(f"index={index}, seed={seed}: both must be at least 0")
    draw_unit = _uniforms(np.random.default_rng([seed, SPLITS.index(split), index]))
    count = 1 + int(next(draw_unit) < pairs)
    forced = int(next(draw_unit) * count) if split == "test" else -1
    objects: list[ObjectSpec] = []
    while len(objects) < count:
        spec = ObjectSpec(**{name: _choose(values, next(draw_unit)) for name, values in ATTRIBUTES.items()})
        # Two objects of one colour could not be told apart where they touch, by the judge or by the codec.
        repeated = any(other.colour == spec.colour for other in objects)
        barred = is_held_out(spec) if split == "train" else len(objects) == forced and not is_held_out(spec)
        if not (repeated or barred):
            objects.append(spec)
    background = _choose(tuple(BACKGROUNDS), next(draw_unit))
    # Captions name objects from left to right, as people do: position tells a network which phrase an object belongs to.
    placed = sorted(zip(_place(objects, draw_unit), objects), key=lambda pair: pair[0][1])
    starts = tuple(start for start, _ in placed)
    scene = Scene(tuple(spec for _, spec in placed), background)
    caption = scene.caption(_choose(VERBS, next(draw_unit)), background_first=next(draw_unit) < 0.5)
    return Clip(index, caption, scene, starts)


def sample_clips(count: int, seed: int = 0, split: str = "train", start: int = 0, pairs: float = 0.5) -> list[Clip]:
    """Clips start .. start + count - 1 of the stream."""
    return [sample_clip(index, seed, split, pairs) for index in range(start, start + count)]


def render_batch(clips: Sequence[Clip], frames: int = FRAMES) -> NDArray[np.uint8]:
    """Frames uint8 (B, T, H, W, C) of many clips at once."""
    objects = [
        (row, spec.shape, spec.colour, spec.size, positions(start, spec.direction, spec.speed, frames))
        for row, clip in enumerate(clips)
        for spec, start in zip(clip.scene.objects, clip.starts)
    ]
    return draw(objects, [clip.scene.background for clip in clips], frames)


def render_parallel(
    count: int, seed: int = 0, split: str = "train", start: int = 0, pairs: float = 0.5, frames: int = FRAMES
) -> NDArray[np.uint8]:
    """Frames of clips start .. start + count - 1, rendered by all cores. Call it under `if __name__ == "__main__"`."""
    chunk = 256
    if count <= chunk:
        return render_batch(sample_clips(count, seed, split, start, pairs), frames)
    jobs = [
        (min(chunk, start + count - at), seed, split, at, pairs, frames) for at in range(start, start + count, chunk)
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as workers:
        return np.concatenate(list(workers.map(_render_job, jobs)))


def _render_job(job: tuple[int, int, str, int, float, int]) -> NDArray[np.uint8]:
    count, seed, split, start, pairs, frames = job
    return render_batch(sample_clips(count, seed, split, start, pairs), frames)


def start_range(spec: ObjectSpec) -> tuple[tuple[float, float], tuple[float, float]]:
    """((y low, y high), (x low, x high)) of the first centre such that the whole path stays inside the frame."""
    radius, travel = SIZES[spec.size], SPEEDS[spec.speed] * (FRAMES - 1)
    up, down, side = (extent * radius + 0.5 for extent in EXTENTS[spec.shape])
    dy, dx = DIRECTIONS[spec.direction]
    low_y, high_y = up + max(0.0, -dy * travel), SIZE - down - max(0.0, dy * travel)
    low_x, high_x = side + max(0.0, -dx * travel), SIZE - side - max(0.0, dx * travel)
    return (low_y, high_y), (low_x, high_x)


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(64).tolist()


def _choose(values: Sequence[str], unit: float) -> str:
    return values[int(unit * len(values))]


def _place_axis(low: float, high: float, draw_unit: Iterator[float]) -> float:
    """A start coordinate: one of the grid's bands that the range reaches, then a place in it. So all bands count alike."""
    edge = SIZE / GRID
    bands = [(max(low, i * edge), min(high, (i + 1) * edge)) for i in range(GRID)]
    bands = [(first, last) for first, last in bands if last - first >= 1.0]
    first, last = bands[int(next(draw_unit) * len(bands))]
    return first + next(draw_unit) * (last - first)


def _place(objects: Sequence[ObjectSpec], draw_unit: Iterator[float]) -> tuple[tuple[float, float], ...]:
    """First centres of the objects: paths inside the frame, at least `_GAP` pixels apart at all times."""
    first = objects[0]
    while True:
        starts = [tuple(_place_axis(low, high, draw_unit) for low, high in start_range(first))]
        if len(objects) == 1:
            return tuple((y, x) for y, x in starts)
        second = objects[1]
        reach = sum(CORNERS[spec.shape] * SIZES[spec.size] for spec in objects) + _GAP
        path_T2 = positions((starts[0][0], starts[0][1]), first.direction, first.speed)
        for _ in range(_TRIES):
            y, x = (_place_axis(low, high, draw_unit) for low, high in start_range(second))
            apart_T2 = positions((y, x), second.direction, second.speed) - path_T2
            if float(np.min(np.hypot(apart_T2[:, 0], apart_T2[:, 1]))) >= reach:
                return ((starts[0][0], starts[0][1]), (y, x))
