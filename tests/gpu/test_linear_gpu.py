"""Linear attention's kernels on a GPU."""

from __future__ import annotations

import cases_linear as cases
import pytest
import torch
from turbokernels import linear_attention
from turbokernels.attention_linear import launch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("feature_map", cases.FEATURE_MAPS)
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize(("length_q", "length_k"), [(1, 1), (63, 257)])
def test_value_gradient_and_tangent(
    feature_map: str, length_q: int, length_k: int, dim: int, dtype: torch.dtype
) -> None:
    # Of a hundred numbers the largest error is luck; in float16 one of many relu may leave plain PyTorch 0 / 0.
    batch = 32 if length_q == 1 and dtype == torch.float32 else 2
    cases.check_value_gradient_and_tangent(feature_map, batch, length_q, length_k, 3, dim, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_video_added_to_a_base(dim: int, dtype: torch.dtype) -> None:
    cases.check_value_gradient_and_tangent("softmax", 1, 32760, 32760, 2, dim, dtype, "cuda", with_sum=True)


@pytest.mark.parametrize("index", range(4))
def test_every_launch_candidate(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "best", lambda op, key, candidates, run, device: candidates[index % len(candidates)])
    cases.check_value_gradient_and_tangent("softmax", 1, 300, 300, 2, 128, torch.bfloat16, "cuda", with_sum=True)


@pytest.mark.parametrize("feature_map", cases.FEATURE_MAPS)
def test_outlier_channels(feature_map: str) -> None:
    cases.check_value_gradient_and_tangent(feature_map, 1, 257, 257, 2, 128, torch.bfloat16, "cuda", outliers=True)


def test_views_give_the_same_bits() -> None:
    cases.check_views_give_the_same_bits("cuda", torch.bfloat16)


def test_expanded_gradient() -> None:
    cases.check_expanded_gradient("cuda")


def test_a_query_without_features_gives_zero_and_not_nan() -> None:
    cases.check_no_features("cuda")


@pytest.mark.parametrize("feature_map", cases.FEATURE_MAPS)
def test_nan_propagates(feature_map: str) -> None:
    cases.check_nan_propagates(feature_map, "cuda")


def test_two_runs_give_the_same_bits() -> None:
    q, k, v = torch.randn(3, 1, 32760, 4, 128, device="cuda", dtype=torch.bfloat16).unbind(0)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    runs = [(o := linear_attention(q, k, v), *torch.autograd.grad(o, (q, k, v), q.detach())) for _ in range(2)]
    for first, second in zip(*runs):
        assert first.equal(second)


def test_a_compiled_graph_does_not_break() -> None:
    q, k, v = torch.randn(3, 1, 1000, 2, 64, device="cuda", dtype=torch.bfloat16).unbind(0)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return linear_attention(q, k, v) * 2.0

    assert torch.compile(run, fullgraph=True)(q, k, v).equal(run(q, k, v))
