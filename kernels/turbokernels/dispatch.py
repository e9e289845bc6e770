"""Which implementation of an op runs: chosen by device, once, and said in the log.

Every op's `api.py` holds a table from implementation name to function ("reference" always; "triton" where a kernel
exists). `auto` takes the best entry of that table for the operands' device. It never falls back silently: an
implementation that does not exist, or that does not support the operands, raises an error that names the remedy.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from turbokernels.tuning import interpreted

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "triton", "reference")


@functools.cache
def _log_choice(op: str, device_type: str, name: str) -> None:
    """Log a choice of `auto`; the cache makes it one line per op and device type in a process."""
    logger.info("turbokernels: %s on %s runs the %s implementation", op, device_type, name)


def choose(op: str, impl: str, device: torch.device, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the function of `table` that `impl` asks for on `device`.

    Errors: ValueError for a name that is not one of `IMPLEMENTATIONS`, for one that this op does not have, and for
    triton on a device that it cannot compile for.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl={impl!r} is not known; use one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "auto":
        name = "triton" if device.type == "cuda" and "triton" in table else "reference"
        if not torch.compiler.is_compiling():  # a log call would break the graph
            _log_choice(op, device.type, name)
        return _there(table[name], name, device)
    if impl not in table:
        raise ValueError(f"{op}: there is no {impl} kernel for this op; use impl='reference' (or impl='auto')")
    if impl == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(
            f"{op}: impl='triton' needs a CUDA device, the operands are on {device}; move them, or use impl='reference' "
            "(or impl='auto')"
        )
    return _there(table[impl], impl, device)


def _there(run: Callable[..., Any], name: str, device: torch.device) -> Callable[..., Any]:
    """`run`, on `device` where that is not the current GPU, which is the one that Triton launches on. Compiled code sees to
    that itself."""
    if name == "reference" or device.type != "cuda" or torch.compiler.is_compiling():
        return run
    if device.index is None or device.index == torch.cuda.current_device():
        return run
    return functools.partial(_run_on, device, run)


def _run_on(device: torch.device, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.cuda.device(device):
        return run(*args, **kwargs)
