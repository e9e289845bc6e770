"""How `kernel_hopper.py` is launched: tiles for every number of channels.

Shape suffixes: B batch, T frames, H, W positions, I, O channels in and out; U, V, Z taps in time, height and width.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from turbokernels.tuning import Launch, best

SHARED = 227 * 1024 - 512  # bytes of a program, less its barriers
CONSUMERS, ROWS = 3, 2  # as in kernel_hopper
# Columns that are multiplied together, two powers of two; the first that divides the channels out.
COLUMNS = ((128, 64), (128, 128), (128, 32), (64, 32), (128, 0), (64, 0), (32, 0), (16, 0))


@functools.cache
def launches(taps_h: int, n_in: int, n_out: int) -> tuple[Launch, ...]:
    """Candidates, best guess first: the deepest rings that shared memory holds beside the output's tile."""
    first, second = next(pair for pair in COLUMNS if n_out % sum(pair) == 0)
    columns = first + second
    width = 64 if columns <= 96 else 32
    found = []
    for depth in (64, 32, 16):
        if n_in % depth:
            continue
        tile = CONSUMERS * ROWS * width * columns * 2
        box = (CONSUMERS * ROWS + taps_h - 1) * width * depth * 2
        for x_slots in (3, 4, 2):
            w_slots = min(8, (SHARED - tile - x_slots * box) // (columns * depth * 2))
            if w_slots >= 3:
                blocks = {"WIDTH": width, "DEPTH": depth, "N1": first, "N2": second}
                found.append(Launch(4, 1, **blocks, X_SLOTS=x_slots, W_SLOTS=w_slots))
    return tuple(found[:4])


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def conv3d(
    x_BTHWI: Tensor, weight_UVZOI: Tensor, bias_O: Tensor | None, out_BTHWO: Tensor | None, shift: tuple[int, int]
) -> Tensor:
    """As reference.conv3d. Channels are filled up to multiples of 16, what an image or a latent has few of."""
    taps_t, taps_h, _, n_out, n_in = weight_UVZOI.shape
    batch, frames, height, width, _ = x_BTHWI.shape
    frames -= taps_t - 1
    if out_BTHWO is not None:
        height, width = out_BTHWO.shape[2:4]
    more_in, more_out = -n_in % 16, -n_out % 16
    bias_O = x_BTHWI.new_zeros(n_out) if bias_O is None else bias_O
    if more_in or more_out:
        x_BTHWI = F.pad(x_BTHWI, (0, more_in)) if more_in else x_BTHWI
        weight_UVZOI, bias_O = F.pad(weight_UVZOI, (0, more_in, 0, more_out)), F.pad(bias_O, (0, more_out))
    y_BTHWO = out_BTHWO
    if y_BTHWO is None or more_out:
        y_BTHWO = x_BTHWI.new_empty(batch, frames, height, width, n_out + more_out)
    for x_THWI, y_THWO in zip(x_BTHWI, y_BTHWO):

        def run(launch: Launch, x_THWI: Tensor = x_THWI, y_THWO: Tensor = y_THWO) -> None:
            _launch(x_THWI, weight_UVZOI, bias_O, y_THWO, shift, launch)

        key = (*weight_UVZOI.shape, x_BTHWI.dtype)
        run(best("conv3d", key, launches(taps_h, *weight_UVZOI.shape[:2:-1]), run, x_BTHWI.device))
    if not more_out:
        return y_BTHWO
    y_BTHWO = y_BTHWO[..., :n_out]
    return y_BTHWO.contiguous() if out_BTHWO is None else out_BTHWO.copy_(y_BTHWO)


def _launch(
    x_THWI: Tensor, weight_UVZOI: Tensor, bias_O: Tensor, out_THWO: Tensor, shift: tuple[int, int], launch: Launch
) -> None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # not in every Triton

    from turbokernels.conv3d import kernel_hopper

    def described(tensor: Tensor, *box: int) -> TensorDescriptor:
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), kernel_hopper.layout(box))

    taps_t, taps_h, taps_w, n_out, n_in = weight_UVZOI.shape
    width, depth, first, second = (launch[name] for name in ("WIDTH", "DEPTH", "N1", "N2"))
    weight = weight_UVZOI.view(-1, n_in)
    n_t, n_h, n_w, _ = out_THWO.shape
    tiles = (n_out // (first + second)) * n_t * triton.cdiv(n_h, CONSUMERS * ROWS) * triton.cdiv(n_w, width)
    kernel_hopper.conv3d_kernel[(min(tiles, _processors(x_THWI.device)),)](
        described(x_THWI, 1, 1, width, depth),
        described(weight, first, depth),
        described(weight, second, depth) if second else None,
        bias_O,
        described(out_THWO, 1, ROWS, width, first),
        described(out_THWO, 1, ROWS, width, second) if second else None,
        *(n_t, n_h, n_w, n_in, n_out, *shift),
        TAPS_T=taps_t,
        TAPS_H=taps_h,
        TAPS_W=taps_w,
        X_SLOTS=launch["X_SLOTS"],
        W_SLOTS=launch["W_SLOTS"],
        num_warps=4,
    )
