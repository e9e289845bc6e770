"""turbotrain: distil, sparsify and quantize Wan video-diffusion transformers, and sample from the result.

The names of the public Python API are resolved on first use, so that `import turbotrain` (and with it every check
that runs before a model is built) stays free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbotrain.checkpoint.io import load_transformer
    from turbotrain.diffusion.turbo_scheduler import TurboScheduler
    from turbotrain.pipeline import TurboPipeline

__version__ = "0.1.0"
__all__ = ["TurboPipeline", "TurboScheduler", "__version__", "load_transformer"]

_HOME = {
    "TurboPipeline": "turbotrain.pipeline",
    "TurboScheduler": "turbotrain.diffusion.turbo_scheduler",
    "load_transformer": "turbotrain.checkpoint.io",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'turbotrain' has no attribute {name!r}")
