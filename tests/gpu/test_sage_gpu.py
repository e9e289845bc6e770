"""Quantised attention's kernels on a GPU."""

from __future__ import annotations

import cases_sage as cases
import pytest
import torch
from turbokernels import sage_attention, sage_sparse_attention, select_blocks
from turbokernels.attention_sage import launch

pytestmark = pytest.mark.gpu


def formats() -> tuple[str, ...]:
    has_fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    return ("fp8", "fp16") if has_fp8 else ("fp16",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pv", formats())
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("length_q", "length_k", "block_q", "block_k"),
    [
        (1, 1, 16, 16),
        (63, 257, 32, 16),
        (257, 300, 64, 64),
        (257, 300, 128, 64),
        (300, 257, 128, 128),
        (70, 129, 64, 32),
    ],
)
def test_sparse(
    pv: str, length_q: int, length_k: int, block_q: int, block_k: int, dim: int, dtype: torch.dtype
) -> None:
    cases.check_sparse(pv, length_q, length_k, block_q, block_k, dim, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pv", formats())
@pytest.mark.parametrize(
    ("length_q", "length_k", "block_q", "block_k", "dim", "feature_map"),
    [
        (1, 1, 16, 16, 16, "softmax"),
        (63, 257, 32, 16, 32, "relu"),
        (257, 300, 64, 64, 64, "elu"),
        (1000, 1030, 128, 64, 128, "softmax"),
        (300, 257, 128, 128, 128, "softmax"),
    ],
)
def test_with_the_linear_branch_in_one_call(
    pv: str,
    length_q: int,
    length_k: int,
    block_q: int,
    block_k: int,
    dim: int,
    feature_map: str,
    dtype: torch.dtype,
) -> None:
    cases.check_one_call(pv, length_q, length_k, block_q, block_k, dim, dtype, "cuda", feature_map)


@pytest.mark.parametrize("pv", formats())
@pytest.mark.parametrize(("block_q", "block_k"), [(128, 64), (128, 128), (64, 64)])
@pytest.mark.parametrize("index", range(7))
def test_every_launch_candidate(
    index: int, block_q: int, block_k: int, pv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "best", lambda op, key, candidates, run, device: candidates[index % len(candidates)])
    cases.check_sparse(pv, 1000, 1030, block_q, block_k, 128, torch.bfloat16, "cuda")


@pytest.mark.parametrize("pv", formats())
@pytest.mark.parametrize("dim", [64, 128])
def test_dense(pv: str, dim: int) -> None:
    cases.check_dense(pv, 1030, 2000, dim, torch.bfloat16, "cuda")


@pytest.mark.parametrize("pv", formats())
@pytest.mark.parametrize("dim", [64, 128])
def test_accuracy(pv: str, dim: int) -> None:
    cases.check_accuracy(pv, 2040, dim, torch.bfloat16, "cuda")


@pytest.mark.parametrize("pv", formats())
def test_a_video(pv: str) -> None:
    q, k, v = torch.randn(3, 1, 32760, 2, 128, device="cuda", dtype=torch.bfloat16).unbind(0)
    mask = select_blocks(q, k, 0.1, 128, 64)
    exact = sage_sparse_attention(q, k, v, mask, pv, impl="reference")
    got = sage_sparse_attention(q, k, v, mask, pv)
    cases.assert_like(got, exact, v, pv)
    assert sage_sparse_attention(q, k, v, mask, pv).equal(got)


def test_smoothing_removes_a_common_key_offset() -> None:
    cases.check_smoothing("cuda")


@pytest.mark.parametrize("pv", formats())
def test_zero_operands(pv: str) -> None:
    cases.check_zeros(pv, "cuda")


@pytest.mark.parametrize("pv", formats())
def test_nan_propagates(pv: str) -> None:
    cases.check_nan_propagates(pv, "cuda")


def test_a_compiled_graph_does_not_break() -> None:
    q, k, v = torch.randn(3, 1, 1000, 2, 64, device="cuda", dtype=torch.bfloat16).unbind(0)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sage_attention(q, k, v) * 2.0

    assert torch.compile(run, fullgraph=True)(q, k, v).equal(run(q, k, v))
