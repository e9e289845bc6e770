"""Tests on a GPU share the parametrised cases of tests/triton and the oracles of tests/kernels."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("triton", "kernels"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
