"""The command-line tools are imported as modules; every kind of network once, tiny."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_wan import KINDS, use_tiny, write_model

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture(autouse=True)
def _tiny_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny(monkeypatch)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder for each kind of network, with all its parts."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch)
        return {kind: write_model(tmp_path_factory.mktemp("models") / kind, name) for kind, name in KINDS.items()}
