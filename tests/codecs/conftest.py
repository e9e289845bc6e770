"""Each tiny folder is written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from codec_folders import write_text, write_vae


@pytest.fixture(scope="session", params=[None, 2], ids=["plain", "patches"])
def vae_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "vae", request.param)


@pytest.fixture(scope="session")
def text_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_text(tmp_path_factory.mktemp("text"))
