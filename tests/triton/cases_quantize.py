"""8-bit quantisation kernels against the reference's integers, on any device; run by tests/triton and tests/gpu."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from turbokernels import quantize_block, quantize_channel, quantize_token
from turbokernels.testing import assert_within_budget

FP8 = torch.float8_e4m3fn


def repair_the_interpreters_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter loses the carry when it rounds to fp8, and truncates subnormals: let torch convert."""
    from triton.language import float8e4nv, float32
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) != (float32, float8e4nv):
            return theirs(values, source, target, rounding)
        bounded = torch.from_numpy(np.clip(values, -448, 448))  # the GPU's conversion saturates
        return bounded.to(FP8).view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def samples(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Tokens of very different size, some with an outlier channel, some whose values sit on halves of the grid."""
    x = torch.randn(shape) * torch.logspace(-3, 2, shape[-2])[:, None]
    x[..., ::3, -1] = 300.0
    # amax / 2 lies halfway between 63 and 64 steps of amax / 127: only the exact quotient rounds as the reference does.
    x[..., 1::4, ::2] = x[..., 1::4, :].abs().amax(-1, keepdim=True) / 2
    return x.to(dtype)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for mine, its in zip(got, expected):
        assert mine.dtype == its.dtype
        assert mine.shape == its.shape
        assert torch.equal(mine.cpu().float(), its.float())


def check_rows(shape: tuple[int, ...], dtype: torch.dtype, target: torch.dtype, device: str) -> None:
    x = samples(shape, dtype)
    expected = quantize_token(x, target, impl="reference")
    assert_same(quantize_token(x.to(device), target, impl="triton"), expected)
    if x.ndim == 2:
        assert_same(quantize_channel(x.to(device), target, impl="triton"), expected)


def check_tiles(shape: tuple[int, ...], block: int, dtype: torch.dtype, device: str) -> None:
    x = samples(shape, dtype)
    assert_same(quantize_block(x.to(device), block, impl="triton"), quantize_block(x, block, impl="reference"))


def check_strides(device: str) -> None:
    """A slice of packed q, k, v; samples cut out of longer ones; a transposed weight."""
    packed = torch.randn(2, 21, 3, 40)
    for x in (packed[:, :, 1], packed[:, 3:, 2], packed[0, ::2, 0], packed[0, :, 0].t()):
        on_device = packed.to(device).as_strided(x.shape, x.stride(), x.storage_offset())
        assert_same(quantize_token(on_device, impl="triton"), quantize_token(x, impl="reference"))
        assert_same(quantize_block(on_device, 16, impl="triton"), quantize_block(x, 16, impl="reference"))


def check_zero_and_non_finite(device: str) -> None:
    x = torch.randn(6, 40)
    x[0], x[1] = 0.0, 1e-40
    x[2, 3], x[3, 39], x[4, 7] = float("nan"), float("inf"), float("-inf")
    q, scale = quantize_token(x.to(device), impl="triton")
    expected = quantize_token(x, impl="reference")[1]
    assert scale.cpu().isfinite().tolist() == [True, True, False, False, False, True]
    assert torch.equal(scale.cpu()[[0, 1, 5]], expected[[0, 1, 5]])
    assert not q[:2].any()
    assert not quantize_block(x.to(device), 32, impl="triton")[1][0].isfinite().any()


def check_empty(device: str) -> None:
    empty = torch.empty(2, 0, 8, device=device)
    assert [t.shape for t in quantize_token(empty, impl="triton")] == [(2, 0, 8), (2, 0)]
    assert [t.shape for t in quantize_block(empty, 16, impl="triton")] == [(2, 0, 8), (2, 0, 1)]


def check_producer(dtype: torch.dtype, activation: str | None, smoothed: bool, device: str) -> None:
    """activation(x) / smooth, quantised: near the exact integers' values, as the reference is."""
    x = (torch.randn(2, 37, 300) * 4).to(dtype)
    smooth = torch.rand(300) + 0.1 if smoothed else None
    on_device = None if smooth is None else smooth.to(device)
    exact = x.double() if activation is None else torch.nn.functional.gelu(x.double(), approximate="tanh")
    exact = exact if smooth is None else exact / smooth.double()

    def per_token(scale: Tensor) -> Tensor:
        return scale[..., None]

    def per_tile(scale: Tensor) -> Tensor:
        return scale.repeat_interleave(32, -2)[..., :37, :].repeat_interleave(32, -1)[..., :300]

    for quantize, spread in ((quantize_token, per_token), (partial(quantize_block, block=32), per_tile)):
        q, scale = quantize(x.to(device), activation=activation, smooth=on_device, impl="triton")
        plain_q, plain_scale = quantize(x, activation=activation, smooth=smooth, impl="reference")
        assert (scale.cpu() - plain_scale).abs().max() <= 2.0**-20 * plain_scale.max()
        # Values that lie halfway between two integers may go either way.
        assert (q.cpu().int() - plain_q.int()).abs().max() <= 1
        assert (q.cpu() != plain_q).float().mean() < 1e-3
        assert_within_budget(q.cpu().float() * spread(scale.cpu()), plain_q.float() * spread(plain_scale), exact)
