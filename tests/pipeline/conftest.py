"""One tiny checkpoint for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_checkpoint

from turbotrain.pipeline import TurboPipeline


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def pipe(checkpoint: Path) -> TurboPipeline:
    return TurboPipeline.from_checkpoint(checkpoint, device="cpu")
