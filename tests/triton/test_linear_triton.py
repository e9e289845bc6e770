"""Linear attention's kernels under the interpreter."""

from __future__ import annotations

import cases_linear as cases
import pytest
import torch
from torch import Tensor
from turbokernels import add_linear_attention_jvp, linear_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("feature_map", cases.FEATURE_MAPS)
@pytest.mark.parametrize(("length_q", "length_k", "dim"), [(1, 1, 16), (63, 257, 32)])
def test_value_gradient_and_tangent(
    feature_map: str, length_q: int, length_k: int, dim: int, dtype: torch.dtype
) -> None:
    cases.check_value_gradient_and_tangent(feature_map, 2, length_q, length_k, 2, dim, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_added_to_a_base(dtype: torch.dtype) -> None:
    cases.check_value_gradient_and_tangent("softmax", 1, 100, 65, 2, 64, dtype, "cpu", with_sum=True)


@pytest.mark.parametrize("feature_map", cases.FEATURE_MAPS)
def test_outlier_channels(feature_map: str) -> None:
    cases.check_value_gradient_and_tangent(feature_map, 1, 65, 130, 1, 32, torch.float16, "cpu", outliers=True)


def test_views_give_the_same_bits() -> None:
    cases.check_views_give_the_same_bits("cpu", torch.float32)


def test_expanded_gradient() -> None:
    cases.check_expanded_gradient("cpu")


def test_a_query_without_features_gives_zero_and_not_nan() -> None:
    cases.check_no_features("cpu")


@pytest.mark.parametrize("feature_map", cases.FEATURE_MAPS)
def test_nan_propagates(feature_map: str) -> None:
    cases.check_nan_propagates(feature_map, "cpu")


def test_what_the_kernels_cannot_do_is_refused() -> None:
    x = torch.randn(1, 8, 1, 24)
    with pytest.raises(ValueError, match=r"no head dim 24; use 16, 32, 64, 128 or impl='reference'"):
        linear_attention(x, x, x, impl="triton")
    x = torch.randn(1, 8, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no torch.float64; use float16, bfloat16, float32 or impl='reference'"):
        linear_attention(x, x, x, impl="triton")


def test_a_compiled_graph_does_not_break() -> None:
    """Training with tangents: forward, tangent and backward as one graph each."""
    leaves = [x.requires_grad_() for x in torch.randn(4, 1, 40, 1, 16).unbind(0)]
    leaves += [torch.randn(16, 16, requires_grad=True), torch.randn(16, requires_grad=True)]
    tbase, *tangents = torch.randn(4, 1, 40, 1, 16).unbind(0)
    do = torch.randn(1, 40, 1, 16)

    def run(base: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        o, to = add_linear_attention_jvp(base, tbase, q, k, v, *tangents, weight, bias, impl="triton")
        return 2.0 * o, to

    expected, got = run(*leaves), torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves)
    assert got[0].equal(expected[0])
    assert got[1].equal(expected[1])
    for one, other in zip(torch.autograd.grad(got[0], leaves, do), torch.autograd.grad(expected[0], leaves, do)):
        assert one.equal(other)


def test_forward_mode_is_refused_and_not_silently_zero() -> None:
    q = torch.randn(1, 16, 1, 16)
    with pytest.raises(RuntimeError, match=r"jvp|forward mode|setup_context"):
        torch.func.jvp(lambda x: linear_attention(x, x, x, impl="triton"), (q,), (q,))
