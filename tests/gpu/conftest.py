"""Tests on a GPU share the cases of tests/triton and tests/model, oracles of tests/kernels, small networks of other folders."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for folder in ("triton", "kernels", "model", "quant", "training"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever a recipe that ran in this process has asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
