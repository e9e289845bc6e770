"""Block selection kernels under the interpreter."""

from __future__ import annotations

import cases_selection as cases
import pytest
import torch
from turbokernels import select_blocks, sparse_attention


@pytest.mark.parametrize("case", cases.CASES)
def test_selection(case: tuple[int, int, int, int, float]) -> None:
    cases.check_selection(case, torch.float16, "cpu")


@pytest.mark.parametrize("case", cases.CASES)
def test_transposed(case: tuple[int, int, int, int, float]) -> None:
    cases.check_transposed(case, "cpu")


@pytest.mark.parametrize("check", [cases.check_strides, cases.check_edges, cases.check_offset])
def test_edges(check) -> None:
    check("cpu")


def test_float64_is_refused() -> None:
    q = torch.randn(1, 32, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"select_blocks: the kernel has no torch\.float64; .* impl='reference'"):
        select_blocks(q, q, 0.5, 16, 16, impl="triton")


def test_selection_and_attention_trace_without_a_graph_break() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = select_blocks(q, k, 0.5, 16, 16, impl="triton")
        return sparse_attention(q, k, v, mask, impl="triton") * 2

    q, k, v = torch.randn(3, 1, 40, 2, 16).unbind(0)
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
        assert torch.equal(compiled, run(q, k, v))
