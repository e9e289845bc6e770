"""Block selection kernels on a GPU."""

from __future__ import annotations

import cases_selection as cases
import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [*cases.CASES, (32760, 32760, 128, 64, 0.1), (75600, 75600, 64, 64, 0.15)])
def test_selection(case: tuple[int, int, int, int, float], dtype: torch.dtype) -> None:
    cases.check_selection(case, dtype, "cuda")


@pytest.mark.parametrize("case", [*cases.CASES, (32760, 32760, 128, 64, 0.1), (75600, 75600, 64, 64, 0.15)])
def test_transposed(case: tuple[int, int, int, int, float]) -> None:
    cases.check_transposed(case, "cuda")


@pytest.mark.parametrize("n_blocks", cases.ROW_LENGTHS)
def test_row_lengths(n_blocks: int) -> None:
    cases.check_row_lengths(n_blocks, "cuda")


@pytest.mark.parametrize("check", [cases.check_strides, cases.check_edges, cases.check_offset])
def test_edges(check) -> None:
    check("cuda")
