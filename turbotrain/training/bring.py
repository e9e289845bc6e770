"""Weights from where they lie (a file that is mapped, say) to where they are used, a tensor at a time.

Eight processes that each cast a network of 14B to float32 in host memory before they shard it hold 456 GB.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from turbotrain.model.wan import FLOAT32_ISLANDS


def bring(module: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Give the parameters of `module` memory of their own on `device`, in `dtype` (float32 islands in float32), in place, and
    take its buffers there as they are. Parameters that are sharded already stay where they lie."""
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            wanted = torch.float32 if FLOAT32_ISLANDS.search(name) is not None else dtype
            # On the CPU even of the same dtype: a file's pages are no place to train in.
            # Pickles keep strides too; sharded and saved are only tensors whose rows follow each other.
            parameter.data = parameter.data.to(device, wanted, copy=device.type == "cpu").contiguous()
    # Not by `module.to`, which would take shards that rest in host memory along.
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
