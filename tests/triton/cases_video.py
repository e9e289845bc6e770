"""Kernels of a video VAE against the reference and float64, on any device; run by tests/triton and tests/gpu."""

from __future__ import annotations

import torch
import turbokernels as tk
from turbokernels.testing import assert_within_budget


def check_rms_norm_silu(shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool, device: str) -> None:
    """Into a stretch of a longer buffer, of which nothing else is touched; the sum to the bit."""
    x = (torch.randn(shape) * torch.logspace(-2, 2, shape[-2])[:, None]).to(dtype)
    weight, residual = torch.rand(shape[-1]) + 0.5, torch.randn(shape).to(dtype) if with_residual else None
    buffer = torch.full((shape[0], shape[1] + 2, *shape[2:]), float("nan"), dtype=dtype, device=device)
    total = x.clone().to(device)
    given = None if residual is None else residual.to(device)
    h = tk.rms_norm_silu(total, weight.to(device), given, buffer[:, 2:], impl="triton")
    assert h.data_ptr() == buffer[:, 2:].data_ptr()
    assert buffer[:, :2].isnan().all()
    plain_total = x.clone()
    plain = tk.rms_norm_silu(plain_total, weight, residual, impl="reference")
    assert torch.equal(total.cpu(), plain_total)
    # The norm is of the sum as it is stored.
    exact = tk.rms_norm_silu(plain_total.double(), weight.double(), impl="reference")
    assert_within_budget(h.cpu(), plain, exact)


def check_non_finite(device: str) -> None:
    """Zeros stay zeros; a NaN or an infinity spoils its own position alone."""
    x = torch.randn(1, 70, 96)
    x[0, 3] = 0
    x[0, 5, 7], x[0, 9, 1] = float("nan"), float("inf")
    h = tk.rms_norm_silu(x.to(device), torch.ones(96, device=device), impl="triton").cpu()
    assert (h[0, 3] == 0).all()
    spoilt = h.isnan().any(-1)[0].nonzero().flatten().tolist()
    assert spoilt == [5, 9]
