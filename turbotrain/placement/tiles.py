"""Rectangles of a frame that a VAE computes one after the other, and how they overlap. No torch here."""

from __future__ import annotations

OVERLAP = 64  # pixels: where neighbours are blended, so that no seam shows
SMALLEST = 3 * OVERLAP  # so that a pixel is in two tiles of an axis at most


def tile_cuts(length: int, tile: int, unit: int = 1) -> list[tuple[int, int]]:
    """Start and stop of each tile of one axis, in pixels: as few as possible, of one size, as small as covers the axis.

    Args:
        tile: the most pixels of one. unit: pixels of a latent cell; every cut is a multiple of it.

    Raises:
        ValueError: tiles too small to be told from their overlap.
    """
    if length <= tile:
        return [(0, length)]
    if tile < SMALLEST or tile % unit:
        raise ValueError(f"vae_tile={tile}: must be a multiple of {unit}, at least {SMALLEST}, or 0 for whole frames")
    count = -(-(length - OVERLAP) // (tile - OVERLAP))
    side = -(-(length + (count - 1) * OVERLAP) // (count * unit)) * unit
    starts = [(length - side) * place // (count - 1) // unit * unit for place in range(count)]
    return [(start, start + side) for start in starts]


def tiled_pixels(height: int, width: int, tile: int) -> tuple[int, int]:
    """Pixels of the largest tile, and of all tiles together."""
    (rows, columns) = (tile_cuts(length, tile) for length in (height, width))
    largest = (rows[0][1] - rows[0][0]) * (columns[0][1] - columns[0][0])
    return largest, largest * len(rows) * len(columns)
