"""Tests on a GPU share the cases of tests/triton and tests/model and the oracles of tests/kernels."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("triton", "kernels", "model"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
