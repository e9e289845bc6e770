"""How much memory a computation keeps alive at its largest moment, found by running it on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # CUDA's allocator hands out multiples of so many bytes


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, until they are freed; `given` ones do not count. peak: bytes."""

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        nbytes = -(-storage.nbytes() // BLOCK) * BLOCK
        self._seen.add(storage._cdata)
        self.live += nbytes
        weakref.finalize(storage, self._free, storage._cdata, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes
