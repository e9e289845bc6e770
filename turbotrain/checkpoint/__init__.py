"""Checkpoints in and out. Names resolve on first use: `header`, `layouts` and `meta` never import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbotrain.checkpoint.header import CheckpointProblem, check_checkpoint, inspect_checkpoint
    from turbotrain.checkpoint.io import load_tensor, load_transformer, read_checkpoint, read_meta, save_checkpoint
    from turbotrain.checkpoint.meta import CheckpointMeta

__all__ = [
    "CheckpointMeta",
    "CheckpointProblem",
    "check_checkpoint",
    "inspect_checkpoint",
    "load_tensor",
    "load_transformer",
    "read_checkpoint",
    "read_meta",
    "save_checkpoint",
]

_HOME = {
    "CheckpointMeta": "meta",
    "CheckpointProblem": "header",
    "check_checkpoint": "header",
    "inspect_checkpoint": "header",
    "load_tensor": "io",
    "load_transformer": "io",
    "read_checkpoint": "io",
    "read_meta": "io",
    "save_checkpoint": "io",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"turbotrain.checkpoint.{_HOME[name]}"), name)
    raise AttributeError(f"module 'turbotrain.checkpoint' has no attribute {name!r}")
