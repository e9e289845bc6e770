"""The operators of a video VAE, as specified: convolution over frames, and the norm between convolutions.

Shape suffixes: B batch, T frames, H, W positions, I, O channels in and out, C channels.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import turbokernels as tk
from torch import Tensor
from torch.nn import functional as F
from turbokernels.conv3d.kernel import COLUMNS, launches
from turbokernels.testing import assert_within_budget
from turbokernels.tuning import MAX_CANDIDATES


def by_definition(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Every tap's product with the pixels that it falls on, which are zero outside the image."""
    taps_t, taps_h, taps_w, n_out, _ = weight.shape
    frames, (height, width), edge = x.shape[1] - taps_t + 1, size, 16
    wide = F.pad(x, (0, 0, edge, edge, edge, edge))
    y = bias.expand(x.shape[0], frames, height, width, n_out).clone()
    for t in range(taps_t):
        for h in range(taps_h):
            for w in range(taps_w):
                top, left = edge + h + shift[0], edge + w + shift[1]
                pixels = wide[:, t : t + frames, top : top + height, left : left + width]
                y += torch.einsum("bthwi,oi->bthwo", pixels, weight[t, h, w])
    return y


CONVOLUTIONS = [
    ((3, 3, 3), (-1, -1)),
    ((3, 1, 1), (0, 0)),
    ((1, 2, 2), (-1, 0)),
    ((1, 2, 2), (0, -1)),
    ((2, 3, 1), (1, 2)),
]


@pytest.mark.parametrize(("taps", "shift"), CONVOLUTIONS)
@pytest.mark.parametrize("size", [(5, 7), (4, 9)])
def test_conv3d(taps: tuple[int, int, int], shift: tuple[int, int], size: tuple[int, int]) -> None:
    """Into a new tensor of the image's size, or into every other pixel of another."""
    x = torch.randn(2, 4, 5, 7, 3, dtype=torch.float64)
    weight, bias = torch.randn(*taps, 6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = by_definition(x, weight, bias, size, shift)
    target = torch.full((2, expected.shape[1], size[0], 2, size[1], 2, 6), float("nan"), dtype=torch.float64)
    out = target[:, :, :, 1, :, 0]
    torch.testing.assert_close(tk.conv3d(x, weight, bias, out, shift), expected)
    torch.testing.assert_close(out, expected)
    assert target[:, :, :, 0].isnan().all()
    if size == (5, 7):
        torch.testing.assert_close(tk.conv3d(x, weight, None, shift=shift), expected - bias)


def test_conv3d_is_rounded_once() -> None:
    x, weight, bias = torch.randn(1, 4, 6, 6, 32), torch.randn(3, 3, 3, 16, 32), torch.randn(16)
    operands = [tensor.bfloat16() for tensor in (x, weight, bias)]
    exact = by_definition(*(tensor.double() for tensor in operands), (6, 6), (-1, -1))
    assert_within_budget(tk.conv3d(*operands), exact.bfloat16(), exact)


def test_conv3d_says_what_it_takes() -> None:
    x, weight = torch.randn(1, 3, 4, 4, 2), torch.randn(3, 3, 3, 5, 2)
    with pytest.raises(ValueError, match=r"conv3d: x \(1, 2, 4, 4, 2\) and weight \(3, 3, 3, 5, 2\); expected"):
        tk.conv3d(x[:, :2], weight)
    with pytest.raises(
        ValueError, match=r"conv3d: out has shape \(1, 2, 4, 4, 5\); expected \(1, 1, height, width, 5\)"
    ):
        tk.conv3d(x, weight, out=torch.empty(1, 2, 4, 4, 5))
    with pytest.raises(ValueError, match=r"conv3d: weight has dtype torch\.float16 but x has torch\.float32"):
        tk.conv3d(x, weight.half())
    with pytest.raises(ValueError, match="x and weight must be contiguous"):
        tk.conv3d(x.transpose(2, 3), weight)
    with pytest.raises(ValueError, match=r"the kernel needs compute capability 9, .* x is torch\.float32 on cpu"):
        tk.conv3d(x, weight, impl="triton")


def test_conv3d_has_tiles_for_every_layer() -> None:
    """Of Wan's VAEs and of smaller ones."""
    channels = (16, 32, 48, 96, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
    for taps_h, n_in, n_out in itertools.product((1, 2, 3), channels, channels):
        found = launches(taps_h, n_in, n_out)
        assert 1 <= len(set(found)) == len(found) <= MAX_CANDIDATES
        for launch in found:
            assert (launch["N1"], launch["N2"]) in COLUMNS
            assert n_out % (launch["N1"] + launch["N2"]) == 0
            assert n_in % launch["DEPTH"] == 0


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 7), (1, 3, 2, 5, 96)])
def test_rms_norm_silu(shape: tuple[int, ...], with_residual: bool) -> None:
    x, weight = torch.randn(shape, dtype=torch.float64), torch.rand(shape[-1], dtype=torch.float64)
    residual = torch.randn_like(x) if with_residual else None
    total = x if residual is None else x + residual
    normed = total / total.square().mean(-1, keepdim=True).sqrt() * weight
    given = x.clone()
    h = tk.rms_norm_silu(given, weight, residual)
    torch.testing.assert_close(h, normed * torch.sigmoid(normed))
    torch.testing.assert_close(given, total)


def test_rms_norm_silu_of_zeros_is_zero_and_nan_stays() -> None:
    x = torch.zeros(1, 3, 8)
    x[0, 1, 2] = float("nan")
    h = tk.rms_norm_silu(x, torch.ones(8))
    assert (h[0, [0, 2]] == 0).all()
    assert h[0, 1].isnan().all()


def test_rms_norm_silu_says_what_it_takes() -> None:
    x, weight = torch.randn(2, 3, 8), torch.ones(8)
    for call, message in [
        (lambda: tk.rms_norm_silu(x[0, 0], weight), r"x has shape \(8,\); expected \(batch, ..., channels\)"),
        (lambda: tk.rms_norm_silu(x, weight[:7]), r"weight is \(7,\) on cpu; expected \(8,\) on cpu"),
        (lambda: tk.rms_norm_silu(x, weight, x[:1]), r"residual has shape \(1, 3, 8\); expected x's shape \(2, 3, 8\)"),
        (lambda: tk.rms_norm_silu(x, weight, out=x.half()), "out has dtype torch.float16 but x has torch.float32"),
        (lambda: tk.rms_norm_silu(x.transpose(0, 1), weight), "must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
