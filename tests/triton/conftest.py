"""Kernels under Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/triton`, in a process of its own.

Triton reads the variable when it is first imported, and many libraries import it; so these tests run apart from the
others, which see the compiled Triton. Tests named `test_compile_*` compile in processes of their own, without it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for folder in ("kernels", "model"):  # the brute-force oracles and the small networks are shared
    sys.path.insert(0, str(HERE.parent / folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    reason = "kernels on a CPU need the interpreter: run TRITON_INTERPRET=1 python -m pytest tests/triton"
    for item in items:
        if HERE in item.path.parents and not item.path.name.startswith("test_compile_"):
            item.add_marker(pytest.mark.skip(reason=reason))
