"""Reads the attributes of a shapes clip back from its pixels, and says which of a caption's claims hold.

The reading knows the world (its colours, shapes and sizes) but nothing of the caption except how many objects to look for; only
then is it compared with the caption, objects being matched to phrases in the order that agrees best. Chance level: captions that
belong to other clips (about 0.38).

How it reads: the background is the clip's median colour; a pixel belongs to the colour whose mixture with the background explains
it best, with that mixture's share as coverage; the colours that cover most are the objects. Their centroids give position and
motion, and the template that differs least from the coverage gives shape and size.

Legend: T frames, H, W pixels, K colours, P window rows/columns. Coordinates are (y, x) in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turbotrain.data.shapes import ATTRIBUTES, GRID, Scene, parse_caption
from turbotrain.data.shapes_render import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZE,
    SIZES,
    SPEEDS,
    coverage_window,
    pace,
)

CONTRAST = 48.0  # a pixel nearer than this to the background (in RGB) is background
LEAST_AREA = 24.0  # pixels that an object must cover: a fifth of the smallest shape
LEAST_MOTION = 0.2  # pixels a frame (of SPEEDS) below which nothing moves
LEAST_FRAMES = 7  # an object seen in fewer frames has no readable motion
HALF = 15  # templates' windows reach this far from the centre
MEAN_SPEED = sum(SPEEDS.values()) / len(SPEEDS)


@dataclass(frozen=True)
class Reading:
    """One object as seen: attribute values (None where unreadable) and its first centre (y, x)."""

    attributes: dict[str, str | None]
    start: tuple[float, float]


@dataclass(frozen=True)
class Judgement:
    """attributes: `background`, and `1.shape`, `1.colour`, ... of each captioned object: read right or not.
    cells: GRID x GRID cells (row, column) in which objects started whose shape and colour are right."""

    attributes: dict[str, bool]
    cells: tuple[tuple[int, int], ...]

    @property
    def accuracy(self) -> float:
        """Fraction of the captioned attributes read right."""
        return sum(self.attributes.values()) / len(self.attributes)


def judge(frames_THWC: NDArray[np.uint8], caption: str | Scene) -> Judgement:
    """Compare a clip, uint8 (T, 64, 64, 3), with a caption of the world's grammar.

    Raises:
        ValueError: frames of another shape, or a caption outside the grammar.
    """
    scene = parse_caption(caption) if isinstance(caption, str) else caption
    background, seen = read_clip(frames_THWC, len(scene.objects))
    best: tuple[int, list[dict[str, bool]], Sequence[Reading | None]] | None = None
    for order in itertools.permutations(seen):
        right = [
            {name: one is not None and one.attributes[name] == getattr(spec, name) for name in ATTRIBUTES}
            for spec, one in zip(scene.objects, order)
        ]
        score = sum(sum(claims.values()) for claims in right)
        if best is None or score > best[0]:
            best = (score, right, order)
    assert best is not None  # a scene has at least one object
    attributes = {"background": background == scene.background}
    cells = []
    for index, (claims, one) in enumerate(zip(best[1], best[2]), 1):
        attributes.update({f"{index}.{name}": value for name, value in claims.items()})
        if one is not None and claims["shape"] and claims["colour"]:
            cells.append(_cell(one.start))
    return Judgement(attributes, tuple(cells))


def coverage(judgements: Sequence[Judgement]) -> float:
    """exp(entropy of the start cells) / number of cells: 1 when starts are spread evenly, 1/16 when all are alike, 0 when no
    object was right in shape and colour."""
    counts = np.zeros(GRID * GRID)
    for judgement in judgements:
        for row, column in judgement.cells:
            counts[row * GRID + column] += 1
    if not counts.sum():
        return 0.0
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()) / counts.size)


def read_clip(frames_THWC: NDArray[np.uint8], count: int) -> tuple[str, list[Reading | None]]:
    """The background's name and `count` objects, the most covering colours first; None where no object is left to see."""
    if frames_THWC.ndim != 4 or frames_THWC.shape[1:] != (SIZE, SIZE, 3) or not len(frames_THWC):
        raise ValueError(
            f"frames are {tuple(frames_THWC.shape)}: the judge reads clips of {SIZE}x{SIZE} pixels, (T, H, W, 3) with T > 0"
        )
    pixels = frames_THWC.astype(np.float32)
    ground_C = np.median(pixels.reshape(-1, 3), axis=0)
    background = _nearest(ground_C, BACKGROUNDS)
    cover_KTHW = _coverage_by_colour(pixels, ground_C)
    area_KT = cover_KTHW.sum((2, 3))
    colours = list(COLOURS)
    seen: list[Reading | None] = []
    for index in np.argsort(-area_KT.mean(1))[:count]:
        visible = area_KT[index].mean() >= LEAST_AREA
        seen.append(_read_object(colours[index], cover_KTHW[index], area_KT[index]) if visible else None)
    return background, seen


def _coverage_by_colour(pixels_THWC: NDArray, ground_C: NDArray) -> NDArray:
    """(K, T, H, W): how much of each pixel each colour covers; every pixel is given to the colour that explains it best."""
    excess_THWC = pixels_THWC - ground_C
    # Most pixels are background: only the others (N of them) are looked at closely.
    strong = np.nonzero((excess_THWC**2).sum(-1) > CONTRAST**2)
    excess_NC = excess_THWC[strong]
    direction_KC = np.asarray(list(COLOURS.values()), dtype=np.float32) - ground_C
    share_KN = np.clip(direction_KC @ excess_NC.T / ((direction_KC**2).sum(1, keepdims=True) + 1e-6), 0.0, 1.0)
    misfit_KN = ((excess_NC - share_KN[..., None] * direction_KC[:, None]) ** 2).sum(-1)
    chosen_N = np.argmin(misfit_KN, axis=0)
    cover_KTHW = np.zeros((len(COLOURS), *pixels_THWC.shape[:3]), dtype=np.float32)
    cover_KTHW[(chosen_N, *strong)] = share_KN[chosen_N, np.arange(len(chosen_N))]
    return cover_KTHW


def _read_object(colour: str, cover_THW: NDArray, area_T: NDArray) -> Reading:
    present_T = area_T >= LEAST_AREA
    frames = np.flatnonzero(present_T)
    axis = np.arange(SIZE) + 0.5
    mass_T = area_T[frames]
    centre_T2 = np.stack(
        [
            (cover_THW[frames].sum(2) @ axis) / mass_T,
            (cover_THW[frames].sum(1) @ axis) / mass_T,
        ],
        axis=1,
    )
    shape, size = _match_template(cover_THW[frames], centre_T2)
    direction = speed = None
    slope_2 = np.zeros(2)
    if len(frames) >= LEAST_FRAMES:
        slope_2 = np.polyfit(frames, centre_T2, 1)[0]
        distance = float(np.abs(slope_2).max()) / pace(len(area_T))
        if distance >= LEAST_MOTION:
            direction = max(DIRECTIONS, key=lambda name: float(slope_2 @ np.asarray(DIRECTIONS[name])))
            speed = min(SPEEDS, key=lambda name: SPEEDS[name] if distance < MEAN_SPEED else -SPEEDS[name])
    start_2 = centre_T2[0] - slope_2 * frames[0]
    found = {"shape": shape, "colour": colour, "size": size, "direction": direction, "speed": speed}
    return Reading(found, (float(start_2[0]), float(start_2[1])))


def _match_template(cover_THW: NDArray, centre_T2: NDArray) -> tuple[str, str]:
    """The (shape, size) whose picture at these centres differs least from the coverage."""
    pad = HALF + 1
    padded = np.pad(cover_THW, ((0, 0), (pad, pad), (pad, pad)))
    best: tuple[float, str, str] | None = None
    windows = None
    for shape in SHAPES:
        for size, radius in SIZES.items():
            template_TPP, corner_T2 = coverage_window(shape, centre_T2, radius, HALF)
            if windows is None:
                width = 2 * HALF + 1
                windows = np.stack(
                    [
                        frame[row + pad : row + pad + width, column + pad : column + pad + width]
                        for frame, (row, column) in zip(padded, corner_T2.tolist())
                    ]
                )
            misfit = float(np.abs(template_TPP - windows).sum())
            if best is None or misfit < best[0]:
                best = (misfit, shape, size)
    assert best is not None  # there are shapes and sizes
    return best[1], best[2]


def _nearest(colour_C: NDArray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(((np.asarray(palette[name]) - colour_C) ** 2).sum()))


def _cell(start_2: tuple[float, float]) -> tuple[int, int]:
    row, column = (min(GRID - 1, max(0, int(value * GRID / SIZE))) for value in start_2)
    return row, column
