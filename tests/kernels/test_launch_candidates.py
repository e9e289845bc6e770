"""Launch candidates of the attention kernels: few, distinct, and of tiles that divide the blocks, on every GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from turbokernels.attention_sparse.kernel import forward_candidates
from turbokernels.attention_sparse.kernel_backward import backward_kv_candidates, backward_q_candidates
from turbokernels.attention_sparse.kernel_jvp import jvp_candidates
from turbokernels.attention_tiles import Gpu
from turbokernels.blocks import BLOCK_SIZES
from turbokernels.tuning import MAX_CANDIDATES

GPUS = [
    Gpu((8, 0), 163 << 10),
    Gpu((8, 9), 99 << 10),
    Gpu((9, 0), 227 << 10),
    Gpu((10, 0), 227 << 10),
    Gpu((12, 0), 99 << 10),
]


@pytest.mark.parametrize("of", [forward_candidates, backward_q_candidates, backward_kv_candidates, jvp_candidates])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_divide_blocks(of, dtype: torch.dtype) -> None:
    for gpu, block_q, block_k in itertools.product(GPUS, BLOCK_SIZES, BLOCK_SIZES):
        candidates = of(dtype, block_q, block_k, gpu)
        assert 1 <= len(set(candidates)) == len(candidates) <= MAX_CANDIDATES
        for launch in candidates:
            assert block_q % launch["R"] == 0
            assert block_k % launch["T"] == 0
            assert min(launch["R"], launch["T"]) >= 16  # the smallest product
