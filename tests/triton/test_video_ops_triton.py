"""Kernels of a video VAE under the interpreter. The convolution's is in Gluon, which has none: it runs in tests/gpu."""

from __future__ import annotations

import cases_video as cases
import pytest
import torch
from turbokernels import rms_norm_silu


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 8), (1, 2, 5, 7, 96), (1, 1, 2, 3, 300)])
def test_rms_norm_silu(shape: tuple[int, ...], with_residual: bool, dtype: torch.dtype) -> None:
    cases.check_rms_norm_silu(shape, dtype, with_residual, "cpu")


def test_non_finite() -> None:
    cases.check_non_finite("cpu")


def test_what_the_kernel_does_not_do_is_named() -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64; use impl='reference'"):
        rms_norm_silu(torch.randn(1, 2, 8, dtype=torch.float64), torch.ones(8), impl="triton")
    with pytest.raises(ValueError, match="rows of up to 4096 channels and x has 5000; use impl='reference'"):
        rms_norm_silu(torch.randn(1, 2, 5000), torch.ones(5000), impl="triton")
    assert rms_norm_silu(torch.randn(1, 0, 8), torch.ones(8), impl="triton").shape == (1, 0, 8)
