"""The shapes world drawn on a GPU: what `shapes.render_batch` draws in numpy, thousands of long clips in seconds.

Legend: B clips, R clips that are drawn at once, T frames, H rows, W columns, C colour channels. Coordinates are (y, x) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from turbotrain.data.shapes import FRAMES, Clip, ObjectSpec
from turbotrain.data.shapes_render import BACKGROUNDS, COLOURS, SHAPES, SIZE, SIZES, positions, signed_distance


@torch.no_grad()
def render_on(device: torch.device | str, clips: Sequence[Clip], frames: int = FRAMES) -> Tensor:
    """Frames uint8 (B, T, H, W, C) on `device`; a grey level may differ by one where numpy's sum rounds the other way."""
    grounds_BC = torch.tensor(
        [BACKGROUNDS[clip.scene.background] for clip in clips], dtype=torch.float32, device=device
    )
    canvas = grounds_BC[:, None, None, None].repeat(1, frames, SIZE, SIZE, 1)
    for slot in range(max(len(clip.starts) for clip in clips)):
        for shape in SHAPES:
            rows = [
                row
                for row, clip in enumerate(clips)
                if slot < len(clip.starts) and clip.scene.objects[slot].shape == shape
            ]
            if rows:
                chosen = [(clips[row].scene.objects[slot], clips[row].starts[slot]) for row in rows]
                at = torch.tensor(rows, device=device)
                canvas[at] = _painted(canvas[at], shape, chosen, frames)
    return canvas.to(torch.uint8)


def _painted(
    canvas_RTHWC: Tensor, shape: str, chosen: Sequence[tuple[ObjectSpec, tuple[float, float]]], frames: int
) -> Tensor:
    """One object of this shape over every clip."""
    device = canvas_RTHWC.device
    paths = np.stack([positions(start, spec.direction, spec.speed, frames) for spec, start in chosen])
    centre_RT2 = torch.from_numpy(paths).to(device)
    pixel_P = torch.arange(SIZE, dtype=torch.float64, device=device) + 0.5
    dy_RTH1 = (pixel_P - centre_RT2[..., :1]).float()[..., None]
    dx_RT1W = (pixel_P - centre_RT2[..., 1:]).float()[..., None, :]
    radius_R111 = torch.tensor([SIZES[spec.size] for spec, _ in chosen], device=device)[:, None, None, None]
    paint_RC = torch.tensor([COLOURS[spec.colour] for spec, _ in chosen], dtype=torch.float32, device=device)
    dy_RTHW, dx_RTHW = torch.broadcast_tensors(dy_RTH1, dx_RT1W)
    alpha_RTHW = (0.5 - signed_distance(shape, dy_RTHW, dx_RTHW, radius_R111, torch)).clamp(0, 1)
    return (canvas_RTHWC + alpha_RTHW[..., None] * (paint_RC[:, None, None, None] - canvas_RTHWC)).round()
