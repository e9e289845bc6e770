"""The tiny checkpoint of tests/pipeline and the command-line tools are imported as modules."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parents[1] / "pipeline", Path(__file__).parents[2] / "tools"):
    sys.path.insert(0, str(folder))
