"""Small matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_matrix import MATRIX


@pytest.fixture
def matrix_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MATRIX)
    return path
