"""Operands on a GPU that is not the current one."""

from __future__ import annotations

import pytest
import torch
import turbokernels as tk

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    inputs = [torch.randn(1, 300, 2, 64, dtype=torch.bfloat16) for _ in range(4)]

    def compute(device: str) -> list[torch.Tensor]:
        q, k, v, do = (x.to(device) for x in inputs)
        primals = [x.requires_grad_() for x in (q, k, v)]
        mask = tk.select_blocks(q, k, 0.5, 64, 64)
        o = tk.sparse_attention(*primals, mask)
        gradients = torch.autograd.grad(o, primals, do)
        with torch.no_grad():
            values, scale = tk.quantize_token(do.flatten(2))
            sage = tk.sage_sparse_attention(q, k, v, mask)
        return [o, *gradients, values, scale, sage]

    assert torch.cuda.current_device() == 0
    for there, here in zip(compute("cuda:1"), compute("cuda:0")):
        assert there.device.index == 1
        torch.testing.assert_close(there.cpu(), here.cpu(), rtol=0.02, atol=0.02)
