"""Loading the folders that diffusers and transformers write: complete, or a ValueError that says which folder to name instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def reading(field: str, path: str | Path, kind: str) -> Iterator[None]:
    """Whatever the libraries raise over a folder becomes a ValueError with the field, its value, the reason and a remedy."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{field}={str(path)!r}: no readable {kind} folder ({reason}); say {field}=FOLDER as save_pretrained writes it, or a "
            "hub id"
        ) from error


def require_complete(loading_info: Mapping[str, Any]) -> None:
    """Both libraries fill missing weights with random numbers and warn. To us a folder without them is unreadable.

    Raises:
        ValueError: weights are missing, or have other shapes.
    """
    missing = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in loading_info[kind])
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")


def quiet_libraries() -> None:
    """diffusers and transformers tell of optional packages and of loading bars that nobody asked for."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
