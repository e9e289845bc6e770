"""Block selection kernels under the interpreter."""

from __future__ import annotations

import cases_selection as cases
import pytest
import torch
from turbokernels import select_blocks


@pytest.mark.parametrize("case", cases.CASES)
def test_selection(case: tuple[int, int, int, int, float]) -> None:
    cases.check_selection(case, torch.float16, "cpu")


@pytest.mark.parametrize("n_blocks", cases.ROW_LENGTHS)
def test_row_lengths(n_blocks: int) -> None:
    cases.check_row_lengths(n_blocks, "cpu")


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
