"""Launch candidates: few, distinct, and of sizes that fit what they divide, on every GPU."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

pytest.importorskip("triton")

from turbokernels.attention_sage.launch import candidates as sage_candidates
from turbokernels.attention_sparse.kernel import forward_candidates
from turbokernels.attention_sparse.kernel_backward import backward_kv_candidates, backward_q_candidates
from turbokernels.attention_sparse.kernel_jvp import jvp_candidates
from turbokernels.attention_tiles import Gpu
from turbokernels.blocks import BLOCK_SIZES
from turbokernels.fused_norm_modulate.kernel import PREFERRED
from turbokernels.rows import MAX_PER_THREAD, MAX_WIDTH, row_launches
from turbokernels.tuning import MAX_CANDIDATES, TABLES, Launch
from turbokernels.w8a8 import kernel

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


def test_int8_linears_have_few_candidates_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")  # which stands for a Hopper GPU
    for gluon, describable in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(kernel, "has_gluon", lambda gluon=gluon: gluon)
        launches = kernel.row_candidates(device, describable)
        assert 1 <= len(set(launches)) == len(launches) <= MAX_CANDIDATES


@pytest.mark.parametrize("width", [1, 48, 300, 1536, 5120, 8960, 13824, MAX_WIDTH])
def test_rows_fit_their_threads(width: int) -> None:
    for preferred in (40, MAX_PER_THREAD):
        launches = row_launches(width, preferred)
        assert 1 <= len(set(launches)) == len(launches) <= MAX_CANDIDATES
        for launch in launches:
            assert -(-width // launch["CHUNK"]) * launch["CHUNK"] <= MAX_PER_THREAD * 32 * launch.num_warps
    idle = [-(-8960 // launch["CHUNK"]) * launch["CHUNK"] - 8960 for launch in row_launches(8960)]
    assert idle[0] == min(idle) < 512  # the first launch is the one that idles least


def test_a_shipped_table_lists_candidates_only() -> None:
    entries = json.loads((TABLES / "nvidia_h200.json").read_text())["entries"]
    rows = {"quantize_rows": MAX_PER_THREAD, "residual_norm": PREFERRED}
    for op, preferred in rows.items():
        for key, entry in entries[op].items():
            assert Launch.from_json(entry) in row_launches(int(key.split(",")[0]), preferred), (op, key)
    linears = [*kernel.HOPPER_GLUON, *kernel.HOPPER_TMA]
    assert all(Launch.from_json(entry) in linears for entry in entries["w8a8_rows"].values())
