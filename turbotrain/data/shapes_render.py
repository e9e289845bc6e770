"""Pixels of the shapes world: anti-aliased coloured shapes on a plain background, numpy only.

A shape is a signed distance in units of pixels; its coverage of a pixel is the distance clipped to one pixel's width, which is
exact for straight edges along the axes and within a few grey levels elsewhere. Only a small window around each object is
computed, so a thousand clips take a few seconds on one core.

Shape suffixes: B clips, K centres of one object (one a frame), T frames, H rows, W columns, C colour channels, P window rows or
columns.
Coordinates are (y, x) in pixels; pixel i covers [i, i + 1), so its centre lies at i + 0.5.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAMES = 13
SIZE = 64
FPS = 8

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 34, 34),
    "green": (34, 178, 44),
    "blue": (40, 64, 232),
    "yellow": (238, 218, 34),
    "purple": (196, 48, 216),
    "cyan": (44, 212, 222),
}
SIZES: dict[str, float] = {"small": 6.5, "large": 10.5}  # radius, pixels
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SPEEDS: dict[str, float] = {"slowly": 0.5, "fast": 1.5}  # pixels per frame of a clip of FRAMES; see `pace`
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (18, 18, 18),
    "gray": (122, 122, 122),
    "white": (238, 238, 238),
}

_SQUARE_HALF = 0.9  # half the side, in radii: area close to the circle's
_CROSS_ARM = 0.38  # half the arm's width, in radii
_CROSS_REACH = 1.1
_TRIANGLE_TOP, _TRIANGLE_BASE, _TRIANGLE_HALF = 1.3, 0.65, 1.2  # about the centroid, in radii

# How far each shape reaches from its centre in radii: up, down, and to either side.
EXTENTS: dict[str, tuple[float, float, float]] = {
    "circle": (1.0, 1.0, 1.0),
    "square": (_SQUARE_HALF, _SQUARE_HALF, _SQUARE_HALF),
    "triangle": (_TRIANGLE_TOP, _TRIANGLE_BASE, _TRIANGLE_HALF),
    "cross": (_CROSS_REACH, _CROSS_REACH, _CROSS_REACH),
}
# The farthest point from the centre, in radii: a corner, except on the circle.
CORNERS: dict[str, float] = {
    "circle": 1.0,
    "square": math.hypot(_SQUARE_HALF, _SQUARE_HALF),
    "triangle": max(_TRIANGLE_TOP, math.hypot(_TRIANGLE_BASE, _TRIANGLE_HALF)),
    "cross": math.hypot(_CROSS_REACH, _CROSS_ARM),
}

_PAD = 16  # windows may reach past the frame's edge; they are cut off after drawing


def signed_distance(shape: str, dy: Any, dx: Any, radius: Any, xp: ModuleType = np) -> Any:
    """Signed distance in pixels (negative inside) of points at (dy, dx) from the centre of a shape with this radius.

    xp: numpy, or torch for tensors: what is used here they call alike.
    """
    if shape == "circle":
        return xp.hypot(dy, dx) - radius
    if shape == "square":
        return xp.maximum(abs(dy), abs(dx)) - _SQUARE_HALF * radius
    if shape == "cross":
        near = xp.minimum(abs(dy), abs(dx)) - _CROSS_ARM * radius
        far = xp.maximum(abs(dy), abs(dx)) - _CROSS_REACH * radius
        return xp.maximum(near, far)
    if shape == "triangle":
        # Apex up. The slanted edge runs from (-top, 0) to (base, half): its outward normal is (-half, top + base), normalised.
        slope = math.hypot(_TRIANGLE_HALF, _TRIANGLE_TOP + _TRIANGLE_BASE)
        ny, nx = -_TRIANGLE_HALF / slope, (_TRIANGLE_TOP + _TRIANGLE_BASE) / slope
        side = (dy + _TRIANGLE_TOP * radius) * ny + abs(dx) * nx
        return xp.maximum(side, dy - _TRIANGLE_BASE * radius)
    raise ValueError(f"shape={shape!r}: expected one of {', '.join(SHAPES)}")


def coverage_window(shape: str, centre_K2: NDArray, radius: float, half: int) -> tuple[NDArray, NDArray]:
    """Coverage (K, P, P) in [0, 1] of one shape in a window of P = 2 half + 1 pixels, and the window's first (row, column)."""
    corner_K2 = np.floor(centre_K2).astype(np.int64) - half
    offset_P = np.arange(2 * half + 1) + 0.5
    dy_KP1 = (corner_K2[:, :1] + offset_P - centre_K2[:, :1])[:, :, None].astype(np.float32)
    dx_K1P = (corner_K2[:, 1:] + offset_P - centre_K2[:, 1:])[:, None, :].astype(np.float32)
    return np.clip(0.5 - signed_distance(shape, dy_KP1, dx_K1P, radius), 0.0, 1.0), corner_K2


def pace(frames: int) -> float:
    """What a frame's step in a clip of `frames` is to one of `SPEEDS`: clips of all lengths show the same way."""
    return (FRAMES - 1) / max(1, frames - 1)


def positions(start_2: tuple[float, float], direction: str, speed: str, frames: int = FRAMES) -> NDArray:
    """Centres (T, 2) of an object that starts at (y, x) and moves evenly."""
    step = np.asarray(DIRECTIONS[direction], dtype=np.float64) * SPEEDS[speed] * pace(frames)
    return np.asarray(start_2, dtype=np.float64) + np.arange(frames)[:, None] * step


def draw(
    objects: list[tuple[int, str, str, str, NDArray]], backgrounds: list[str], frames: int = FRAMES, size: int = SIZE
) -> NDArray[np.uint8]:
    """Frames uint8 (B, T, H, W, C) of `objects`, each (clip, shape, colour, size, centres (T, 2)), on one background per clip."""
    width = size + 2 * _PAD
    canvas = np.empty((len(backgrounds), frames, width, width, 3), dtype=np.uint8)
    canvas[:] = np.asarray([BACKGROUNDS[name] for name in backgrounds], dtype=np.uint8)[:, None, None, None, :]
    for clip, shape, colour, size_name, centre_T2 in objects:
        radius = SIZES[size_name]
        half = int(np.ceil(1.3 * radius)) + 1
        alpha_TPP, corner_T2 = coverage_window(shape, centre_T2 + _PAD, radius, half)
        paint_C = np.asarray(COLOURS[colour], dtype=np.float32)
        for alpha_PP, (row, column), frame_HWC in zip(alpha_TPP, corner_T2.tolist(), canvas[clip]):
            window_PPC = frame_HWC[row : row + 2 * half + 1, column : column + 2 * half + 1]
            blend_PPC = window_PPC + alpha_PP[..., None] * (paint_C - window_PPC)
            window_PPC[...] = np.rint(blend_PPC).astype(np.uint8)
    return np.ascontiguousarray(canvas[:, :, _PAD : _PAD + size, _PAD : _PAD + size])
