"""Sparse and dense attention kernels, their gradients and tangents, under the interpreter."""

from __future__ import annotations

import cases_attention as cases
import pytest
import torch
import triton
import triton.language as tl
from turbokernels import attention_jvp, select_blocks, sparse_attention, sparse_attention_jvp, tuning
from turbokernels.attention_tiles import exp_exact


@triton.jit
def exponential_kernel(p_x, p_out, N: tl.constexpr):
    """out = exp(x), of N values."""
    i_x = tl.arange(0, N)
    tl.store(p_out + i_x, exp_exact(tl.load(p_x + i_x)))


@pytest.mark.parametrize("case", cases.SPARSE_CASES)
def test_sparse(case: tuple) -> None:
    cases.check_sparse(case, torch.float16, "cpu")


@pytest.mark.parametrize("case", cases.DENSE_CASES)
def test_dense(case: tuple[int, int, int]) -> None:
    cases.check_dense(case, torch.float16, "cpu")


def test_single_precision() -> None:
    cases.check_sparse((33, 40, 16, 32, 0.5, 16), torch.float32, "cpu")
    cases.check_dense((20, 40, 32), torch.float32, "cpu")


@pytest.mark.parametrize("index", range(1, 7))
def test_launch_candidates(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tiles a search finds fastest: several programs per block, and several steps per kept block."""
    monkeypatch.setattr(tuning, "best", lambda op, key, candidates, run, device: candidates[index % len(candidates)])
    cases.check_sparse((150, 200, 128, 128, 0.7, 16), torch.float16, "cpu")


@pytest.mark.parametrize("size", [3.0, 10.0])
def test_outliers(size: float) -> None:
    cases.check_sparse((63, 100, 32, 32, 0.6, 32), torch.float16, "cpu", size)
    cases.check_dense((63, 40, 32), torch.float16, "cpu", size)


def test_exponential() -> None:
    """Within a unit in the last place of float32 where its result is normal, and what is not a number stays so."""
    tails = torch.tensor([float("-inf"), float("nan"), -3e38, -87.0, -87.5, 0.0, -1e-30, 88.0])
    x = torch.cat([torch.linspace(-100, 0, 2**14 - 8), -torch.logspace(-30, 4, 2**14), tails, torch.rand(2**15) * 88.0])
    got = torch.empty_like(x)
    exponential_kernel[(1,)](x, got, len(x))
    exact = x.double().exp()
    last_place = torch.exp2(exact.log2().floor() - 23)
    counts = x >= -87.0
    assert ((got - exact).abs() / last_place)[counts].max() <= 1.0
    assert (got[x < -87.0] == 0.0).all()
    assert got.isnan().equal(x.isnan())


@pytest.mark.parametrize("sparse", [True, False])
def test_strides(sparse: bool) -> None:
    cases.check_strides(sparse, torch.float16, "cpu")


@pytest.mark.parametrize(
    "check",
    [cases.check_one_key, cases.check_absent_tangents, cases.check_only_the_value_has_a_gradient, cases.check_nan],
)
def test_edges(check) -> None:
    check("cpu")


@pytest.mark.parametrize("trained", [False, True])
def test_no_graph_breaks(trained: bool) -> None:
    """Selection, attention and tangents are opaque to the compiler, which sees their shapes."""
    q, k, v = (torch.randn(1, 20, 2, 16, requires_grad=trained) for _ in range(3))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = select_blocks(q, k, 0.5, 16, 16, impl="triton")
        o = sparse_attention(q, k, v, mask, impl="triton")
        o, to = sparse_attention_jvp(o, k, v, v.detach(), q.detach(), q.detach(), mask, impl="triton")
        o, to = attention_jvp(o, k, v, to, None, None, impl="triton")
        return o + to

    compiled, eager = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v)
    assert torch.equal(compiled, eager)
    if trained:
        for got, expected in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (compiled, eager))):
            assert torch.equal(got, expected)


def test_a_transform_is_refused() -> None:
    """The kernels are opaque to torch.func as well, which would take their tangent for zero."""
    q = torch.randn(1, 16, 1, 16)
    mask = cases.random_mask(1, 1, 16, 16, 16, 16, 1.0)
    with pytest.raises(ValueError, match="no tangent and no batching rule"):
        torch.func.jvp(lambda x: sparse_attention(x, x, x, mask, impl="triton"), (q,), (q,))
    with pytest.raises(ValueError, match="no tangent and no batching rule"):
        torch.func.jvp(lambda x: attention_jvp(x, x, x, x, x, x, impl="triton")[0], (q,), (q,))


def test_what_the_kernel_does_not_do_is_named() -> None:
    def refused(dim: int, dtype: torch.dtype, message: str) -> None:
        x = torch.zeros(1, 32, 1, dim, dtype=dtype)
        mask = cases.random_mask(1, 1, 32, 32, 16, 16, 0.5)
        with pytest.raises(ValueError, match=f"sparse_attention: {message}"):
            sparse_attention(x, x, x, mask, impl="triton")
        with pytest.raises(ValueError, match=f"attention_jvp: {message}"):
            attention_jvp(x, x, x, x, x, x, impl="triton")

    refused(16, torch.float64, "the kernel has no torch.float64; use float16, bfloat16, float32 or impl='reference'")
    refused(24, torch.float32, "the kernel has no head dim 24; use 16, 32, 64, 128 or impl='reference'")
