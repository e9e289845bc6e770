"""A video decoded in squares, one after the other, blended where they overlap: a frame that is too large for the memory.

The decoder's middle looks at a whole frame at once, so tiles differ from whole frames a little.

Legend: B batch, C channels, T frames, H, W positions, P pixels of one axis of a tile; latents are (B, C, T', H', W').
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from turbotrain.codecs.vae import VideoCodec
from turbotrain.placement.tiles import tile_cuts


def decode_in_tiles(codec: VideoCodec, latents_BCTHW: Tensor, tile: int) -> Tensor:
    """uint8 frames (B, T, H, W, 3), like `codec.decode`, from squares with `tile` pixels a side.

    Raises:
        ValueError: a tile that is no multiple of the codec's stride or too small, latents of another codec.
    """
    _, stride_h, stride_w = codec.stride
    rows = _cuts(latents_BCTHW.shape[3], tile, stride_h)
    columns = _cuts(latents_BCTHW.shape[4], tile, stride_w)
    if len(rows) == len(columns) == 1:
        return codec.decode(latents_BCTHW)
    frames = None
    weights = _weights(rows, stride_h, torch.device("cpu")), _weights(columns, stride_w, torch.device("cpu"))
    for (row, weight_H), (column, weight_W) in itertools.product(zip(rows, weights[0]), zip(columns, weights[1])):
        part_BTHWC = codec.decode(latents_BCTHW[..., row, column])
        if frames is None:
            batch, length = part_BTHWC.shape[:2]
            size = latents_BCTHW.shape[3] * stride_h, latents_BCTHW.shape[4] * stride_w
            # Whole numbers up to 255 and sums of a few parts of them: 16 bits are enough.
            frames = torch.zeros(batch, length, *size, 3, dtype=torch.float16, device=part_BTHWC.device)
        target = frames[
            :, :, row.start * stride_h : row.stop * stride_h, column.start * stride_w : column.stop * stride_w
        ]
        for part_THWC, target_THWC in zip(
            part_BTHWC.unbind(1), target.unbind(1)
        ):  # by frames: the sum needs no copy of all
            target_THWC += part_THWC * (weight_H[:, None, None] * weight_W[:, None])
    assert frames is not None
    whole = torch.empty(frames.shape, dtype=torch.uint8, device=frames.device)
    for source, target in zip(frames.unbind(1), whole.unbind(1)):
        target.copy_(source.round())
    return whole


def _cuts(length: int, tile: int, stride: int) -> list[slice]:
    """Latent positions of each tile along an axis."""
    cuts = tile_cuts(length * stride, tile, stride)
    return [slice(start // stride, stop // stride) for start, stop in cuts]


def _weights(cuts: list[slice], stride: int, device: torch.device) -> list[Tensor]:
    """(P,) of each tile: 1 where it is alone, linear ramps that add up to 1 where two overlap."""
    made = [torch.ones((cut.stop - cut.start) * stride, device=device) for cut in cuts]
    for (before, after), (left_P, right_P) in zip(itertools.pairwise(cuts), itertools.pairwise(made)):
        shared = (before.stop - after.start) * stride
        ramp = (torch.arange(shared, device=device) + 0.5) / shared
        right_P[:shared] = ramp
        left_P[-shared:] = 1 - ramp
    return made
