"""The Wan diffusion transformer. Names resolve on first use: `variants` and `attention_config` never import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbotrain.model.attention_config import AttentionConfig
    from turbotrain.model.variants import VARIANTS, Variant, WanConfig
    from turbotrain.model.wan import WanTransformer

__all__ = ["VARIANTS", "AttentionConfig", "Variant", "WanConfig", "WanTransformer"]

_HOME = {
    "AttentionConfig": "attention_config",
    "VARIANTS": "variants",
    "Variant": "variants",
    "WanConfig": "variants",
    "WanTransformer": "wan",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"turbotrain.model.{_HOME[name]}"), name)
    raise AttributeError(f"module 'turbotrain.model' has no attribute {name!r}")
