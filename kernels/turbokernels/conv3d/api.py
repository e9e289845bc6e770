"""Public entry of the convolution over frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turbokernels import dispatch
from turbokernels.checks import check_floating
from turbokernels.conv3d import reference
from turbokernels.tuning import capability, has_gluon


def _triton(*operands: Any) -> Tensor:
    from turbokernels.conv3d import kernel  # here, so that the library imports without Triton

    return kernel.conv3d(*operands)


def has_kernel(x: Tensor) -> bool:
    """Whether the kernel takes such operands: 16-bit ones on Hopper."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16)
        and capability(x.device)[0] == 9
        and has_gluon()
    )


@torch.no_grad()
def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    shift: tuple[int, int] = (-1, -1),
    impl: str = "auto",
) -> Tensor:
    """y[t, h, w] = bias + sum over taps (a, b, c) of weight[a, b, c] x[t + a, h + b + shift[0], w + c + shift[1]].

    x: (B, T + A - 1, H, W, I), contiguous: whatever lies before the first frame is part of it; beyond height and width x is
    zero. weight: (A, B, C, O, I), contiguous: one matrix a tap; bias: (O). out: (B, T, H', W', O) to be written, any strides
    with contiguous channels; None: a new one of x's height and width. Products are summed in float32 (float64 for float64),
    and rounded once. For inference: no gradient.
    `auto` is the kernel where `has_kernel`, and PyTorch's convolution elsewhere.
    Errors: ValueError when shapes, dtypes, devices or strides do not fit.
    """
    op = "conv3d"
    if x.ndim != 5 or weight.ndim != 5 or weight.shape[-1] != x.shape[-1] or x.shape[1] < weight.shape[0]:
        raise ValueError(
            f"{op}: x {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (batch, frames, height, width, channels), at "
            "least as many frames as taps, and (taps in time, height, width, channels out, channels in)"
        )
    frames = x.shape[1] - weight.shape[0] + 1
    if out is not None and (out.ndim != 5 or (*out.shape[:2], out.shape[-1]) != (x.shape[0], frames, weight.shape[3])):
        raise ValueError(
            f"{op}: out has shape {tuple(out.shape)}; expected ({x.shape[0]}, {frames}, height, width, {weight.shape[3]})"
        )
    others = {name: tensor for name, tensor in {"bias": bias, "out": out}.items() if tensor is not None}
    check_floating(op, x=x, weight=weight, **others)
    if not x.is_contiguous() or not weight.is_contiguous():
        raise ValueError(f"{op}: x and weight must be contiguous: pass .contiguous() tensors")
    supported = has_kernel(x)
    if impl == "triton" and not supported:
        raise ValueError(
            f"{op}: the kernel needs compute capability 9, Triton 3.6 or 3.7 and 16-bit operands; x is {x.dtype} on "
            f"{x.device}: use impl='auto'"
        )
    table: dict[str, Callable[..., Tensor]] = {
        "reference": reference.conv3d,
        **({"triton": _triton} if supported else {}),
    }
    return dispatch.choose(op, impl, x.device, table)(x, weight, bias, out, shift)
