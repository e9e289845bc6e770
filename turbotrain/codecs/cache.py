"""Text embeddings on disk, so that a prompt that was encoded once needs no encoder again.

One safetensors file an embedding, named by a hash of everything that it depends on; only the rows of the prompt's own tokens are
kept, in float32. A cache is a convenience: what cannot be read or written is said and otherwise ignored.

Legend: L tokens, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from turbotrain.checkpoint.atomic import new_file
from turbotrain.codecs.text import clean

logger = logging.getLogger(__name__)
_KEY = "embedding"
_VERSION = 1  # of cleaning, padding and file format


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/turbotrain/text`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "turbotrain" / "text"


def files_identity(places: Sequence[str]) -> list[tuple[str, int, int]] | None:
    """(path, size, time of change) of every file at these places; None where one is a hub id, whose files are not known.

    Hashing 11 GB would take longer than encoding a prompt: a file that was changed has another time.
    """
    found: list[tuple[str, int, int]] = []
    for place in places:
        path = Path(place).expanduser().resolve()
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        if not files:
            return None
        found += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return found


class EmbeddingCache:
    """Embeddings of one encoder. settings: whatever else changes its numbers (tokens, dtype, kind of device)."""

    def __init__(
        self, folder: Path, files: Sequence[tuple[str, int, int]], text_len: int, settings: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.text_len = text_len
        identity = {"version": _VERSION, "files": list(files), "text_len": text_len, **settings}
        self._identity = json.dumps(identity, sort_keys=True)

    def path(self, prompt: str) -> Path:
        """Where the prompt's embedding lies; prompts that are equal once cleaned share it."""
        key = hashlib.sha256(f"{self._identity}\n{clean(prompt)}".encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / f"{key}.safetensors"

    def get(self, prompt: str) -> Tensor | None:
        """(L, D) float32, or None where there is no sound entry."""
        path = self.path(prompt)
        try:
            rows_LD = load(path.read_bytes())[_KEY]
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning("%s: unreadable cache entry, encoded anew (%s)", path, error)
            return None
        sound = rows_LD.ndim == 2 and rows_LD.dtype == torch.float32 and 1 <= len(rows_LD) <= self.text_len
        if not sound or not bool(torch.isfinite(rows_LD).all()):
            logger.warning("%s: no embedding of up to %d tokens, encoded anew", path, self.text_len)
            return None
        return F.pad(rows_LD, (0, 0, 0, self.text_len - len(rows_LD)))

    def put(self, prompt: str, embeds_LD: Tensor) -> None:
        """Keeps the embedding; written beside its place and renamed."""
        filled = embeds_LD.any(dim=1).nonzero()
        rows_LD = embeds_LD[: int(filled.max()) + 1 if len(filled) else 1]
        path = self.path(prompt)
        try:
            with new_file(path) as new:
                new.write_bytes(save({_KEY: rows_LD.detach().float().cpu().contiguous()}))
        except OSError as error:
            logger.warning("not cached: %s; text_cache=false asks for none", error)
