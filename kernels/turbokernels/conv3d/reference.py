"""Specification of the convolution over frames, in plain PyTorch.

Shape suffixes: B batch, T frames, H, W positions, I, O channels in and out; U, V, Z taps in time, height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def conv3d(
    x_BTHWI: Tensor, weight_UVZOI: Tensor, bias_O: Tensor | None, out_BTHWO: Tensor | None, shift: tuple[int, int]
) -> Tensor:
    """y[t, h, w] = bias + sum over taps (u, v, z) of weight[u, v, z] x[t + u, h + v + shift, w + z + shift]."""
    height, width = x_BTHWI.shape[2:4] if out_BTHWO is None else out_BTHWO.shape[2:4]
    edges: list[int] = []
    for size, taps, first, wanted in zip(
        x_BTHWI.shape[2:4], weight_UVZOI.shape[1:3], shift, (height, width), strict=True
    ):
        edges = [-first, wanted + taps - 1 + first - size, *edges]
    x_BITHW = x_BTHWI.movedim(-1, 1)
    padding = (0, 0, 0)
    if edges[0] == edges[1] >= 0 and edges[2] == edges[3] >= 0:
        padding = (0, edges[2], edges[0])
    else:
        x_BITHW = F.pad(x_BITHW, edges)
    weight_OIUVZ = weight_UVZOI.permute(3, 4, 0, 1, 2).contiguous(memory_format=torch.channels_last_3d)
    y_BTHWO = F.conv3d(x_BITHW, weight_OIUVZ, bias_O, padding=padding).movedim(1, -1)
    return y_BTHWO.contiguous() if out_BTHWO is None else out_BTHWO.copy_(y_BTHWO)
