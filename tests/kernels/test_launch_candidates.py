"""Launch candidates of the attention kernels: few, distinct, and of tiles that divide the blocks, on every GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from turbokernels.attention_sage.launch import candidates as sage_candidates
from turbokernels.attention_sparse.kernel import forward_candidates
from turbokernels.attention_sparse.kernel_backward import backward_kv_candidates, backward_q_candidates
from turbokernels.attention_sparse.kernel_jvp import jvp_candidates
from turbokernels.attention_tiles import Gpu
from turbokernels.blocks import BLOCK_SIZES
from turbokernels.tuning import MAX_CANDIDATES
from turbokernels.w8a8.kernel import HOPPER_GLUON, HOPPER_POINTERS, HOPPER_TMA

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


def test_quantised_attention_has_few_and_distinct_candidates() -> None:
    for block_q, block_k, dim, pv in itertools.product(BLOCK_SIZES, BLOCK_SIZES, (16, 32, 64, 128), ("fp8", "fp16")):
        launches = sage_candidates(torch.empty(1, 1, 1, dim), block_q, block_k, pv)
        assert 1 <= len(set(launches)) == len(launches) <= MAX_CANDIDATES


def test_int8_linears_have_few_candidates_on_hopper() -> None:
    assert len(HOPPER_GLUON + HOPPER_TMA) <= MAX_CANDIDATES
    assert len(HOPPER_TMA + HOPPER_POINTERS) <= MAX_CANDIDATES
