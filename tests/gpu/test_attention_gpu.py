"""Sparse and dense attention kernels, their gradients and tangents, on a GPU."""

from __future__ import annotations

import cases_attention as cases
import pytest
import torch
from kernel_oracles import random_operands
from turbokernels import attention_jvp, select_blocks, sparse_attention, sparse_attention_jvp
from turbokernels.testing import assert_within_budget

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*cases.SPARSE_CASES, (1000, 900, 128, 64, 0.3, 128), (1000, 900, 64, 64, 0.3, 128)])
def test_sparse(case: tuple, dtype: torch.dtype) -> None:
    cases.check_sparse(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*cases.DENSE_CASES, (1000, 513, 128)])
def test_dense(case: tuple[int, int, int], dtype: torch.dtype) -> None:
    cases.check_dense(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [3.0, 10.0])
def test_outliers(size: float, dtype: torch.dtype) -> None:
    cases.check_sparse((257, 200, 128, 64, 0.6, 128), dtype, "cuda", size)
    cases.check_dense((257, 200, 128), dtype, "cuda", size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [True, False])
def test_strides(sparse: bool, dtype: torch.dtype) -> None:
    cases.check_strides(sparse, dtype, "cuda")


@pytest.mark.parametrize(
    "check",
    [cases.check_one_key, cases.check_absent_tangents, cases.check_only_the_value_has_a_gradient, cases.check_nan],
)
def test_edges(check) -> None:
    check("cuda")


@pytest.mark.parametrize("block_q", [128, 64])
def test_a_video(block_q: int) -> None:
    """81 frames of 480p: against the reference, which the CPU tests hold to the definition, in float64."""
    operands = tuple(x.cuda() for x in random_operands(1, 32760, 1, 128, dtype=torch.bfloat16))
    mask = select_blocks(*operands[:2], 0.1, block_q, 64)

    def reference(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        q, k, v, tq, tk, tv, do = (x.to(dtype) for x in operands)
        primals = tuple(x.clone().requires_grad_() for x in (q, k, v))
        o, to = sparse_attention_jvp(*primals, tq, tk, tv, mask, impl="reference")
        return o, to, *torch.autograd.grad(o, primals, do)

    # The reference computes in float32 what a plain bf16 softmax rounds, so this budget is tighter than that of the others.
    for name, got, rough, exact in zip(
        cases.NAMES, cases.compute(operands, mask), reference(torch.bfloat16), reference(torch.float64)
    ):
        assert_within_budget(got, rough, exact, name)


def test_compiles_without_a_graph_break() -> None:
    q, k, v = (torch.randn(1, 300, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = select_blocks(q, k, 0.5, 64, 64)
    compiled = torch.compile(lambda *x: sparse_attention(*x, mask) * 2, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), sparse_attention(q, k, v, mask) * 2)


def test_lengths_share_one_binary() -> None:
    """81 to 121 frames, and any topk: no compilation per length."""
    from turbokernels.attention_sparse.kernel import forward_kernel
    from turbokernels.attention_sparse.kernel_jvp import jvp_kernel

    def run(length: int, topk: float) -> None:
        q = torch.randn(1, length, 2, 64, device="cuda", dtype=torch.bfloat16)
        mask = select_blocks(q, q, topk, 64, 64)
        sparse_attention(q, q, q, mask)
        attention_jvp(q, q, q, q, q, q)

    def binaries() -> int:
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in (forward_kernel, jvp_kernel))

    run(1024, 0.25)
    before = binaries()
    for length, topk in ((1, 0.1), (777, 0.5), (1040, 1.0)):
        run(length, topk)
    assert binaries() == before
