"""Tiles cover every pixel once or twice, and blend into what one piece would be wherever the decoder is local."""

from __future__ import annotations

import itertools
from typing import cast

import pytest
import torch
from torch import Tensor

from turbotrain.codecs import VideoCodec
from turbotrain.codecs.tiles import decode_in_tiles
from turbotrain.placement.tiles import OVERLAP, SMALLEST, tile_cuts, tiled_pixels


@pytest.mark.parametrize("unit", [1, 8, 16])
@pytest.mark.parametrize("tile", [192, 256, 512])
def test_tiles_cover_an_axis_in_pieces_of_one_size(tile: int, unit: int) -> None:
    for length in range(tile - 2 * unit, 2000, 16):
        cuts = tile_cuts(length, tile, unit)
        assert cuts[0][0] == 0
        assert cuts[-1][1] == length
        assert len({stop - start for start, stop in cuts}) == 1
        assert cuts[0][1] <= max(tile, length if len(cuts) == 1 else 0)
        assert all(edge % unit == 0 for cut in cuts[:-1] for edge in cut)
        for (_, before), (after, _) in itertools.pairwise(cuts):
            assert before - after >= OVERLAP - unit
        for (_, before), (after, _) in zip(cuts, cuts[2:]):
            assert after >= before


def test_bad_tiles_are_refused() -> None:
    for tile in (SMALLEST - 8, 260):
        with pytest.raises(ValueError, match=f"vae_tile={tile}: must be a multiple of 8, at least {SMALLEST}"):
            tile_cuts(1280, tile, 8)
    assert tile_cuts(128, 8, 8) == [(0, 128)] if 128 <= 8 else True


def test_tiles_are_no_larger_than_they_need_to_be() -> None:
    largest, together = tiled_pixels(720, 1280, 512)
    assert largest < 512 * 512 * 0.75
    assert together < 720 * 1280 * 1.3
    assert tiled_pixels(480, 832, 1024) == (480 * 832, 480 * 832)


class LocalCodec:
    """A decoder that looks at one latent cell for each of its pixels."""

    stride = (4, 8, 8)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        self.shapes.append(tuple(latents_BCTHW.shape))
        frames = latents_BCTHW[:, :3].repeat_interleave(4, 2)[:, :, 3:].repeat_interleave(8, 3).repeat_interleave(8, 4)
        return frames.movedim(1, -1).round().to(torch.uint8)


def test_tiles_of_a_local_decoder_are_its_frames() -> None:
    latents_BCTHW = torch.randint(0, 256, (2, 4, 3, 50, 70)).float()
    codec = LocalCodec()
    expected = codec.decode(latents_BCTHW)
    tiled = decode_in_tiles(cast(VideoCodec, codec), latents_BCTHW, 256)
    assert len(codec.shapes) == 1 + 2 * 3
    assert max(shape[3] for shape in codec.shapes[1:]) <= 256 // 8
    assert torch.equal(tiled, expected)
    whole = decode_in_tiles(cast(VideoCodec, codec), latents_BCTHW, 560)
    assert torch.equal(whole, expected)
    assert len(codec.shapes) == 8


class SteppingCodec(LocalCodec):
    """Every tile is brighter than the last one."""

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        return torch.full_like(super().decode(latents_BCTHW), 100 * (len(self.shapes) - 1))


def test_neighbours_fade_into_each_other() -> None:
    row = decode_in_tiles(cast(VideoCodec, SteppingCodec()), torch.zeros(1, 4, 1, 24, 60), 320)[0, 0, 0, :, 0].int()
    assert row[0] == 0
    assert row[-1] == 100
    steps = row.diff()
    assert (steps >= 0).all()
    assert steps.max() <= 3  # of 100 over 64 pixels: no seam
