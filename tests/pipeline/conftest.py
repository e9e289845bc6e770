"""One tiny checkpoint for all tests of this folder; the command-line tools are imported as modules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import write_checkpoint

from turbotrain.pipeline import TurboPipeline

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def pipe(checkpoint: Path) -> TurboPipeline:
    return TurboPipeline.from_checkpoint(checkpoint, device="cpu")
