"""Networks of the shapes variant's kind as files of every kind that training starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from turbotrain.checkpoint import CheckpointMeta, save_checkpoint
from turbotrain.model.quant_linear import quantize_block_linears
from turbotrain.model.variants import VARIANTS, WanConfig
from turbotrain.model.wan import WanTransformer

SMALL = dataclasses.replace(VARIANTS["shapes"].config, dim=128, ffn_dim=192, num_heads=1, num_layers=2)
# 105 MB in float32, 4 MB a block.
DEEP = dataclasses.replace(VARIANTS["shapes"].config, dim=256, ffn_dim=1024, num_heads=2, num_layers=24, freq_dim=32)


def save(folder: Path, config: WanConfig, kind: str) -> tuple[Path, int]:
    """(the checkpoint, bytes of its numbers in float32)."""
    torch.manual_seed(0)
    network = WanTransformer(config)
    nn.init.normal_(network.head.head.weight)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    if kind == "bf16":
        network.set_weight_dtype(torch.bfloat16)
    for block in network.blocks if kind == "int8" else ():
        quantize_block_linears(block, "int8_channel")
    if kind == "pth":
        state = network.state_dict()
        state["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"].T.contiguous().T  # a pickle keeps strides
        torch.save(state, folder / "network.pth")
        return folder / "network.pth", 4 * numbers
    scheme = {"scheme": "int8_channel"} if kind == "int8" else None
    meta = CheckpointMeta("shapes", config.to_dict(), network.attention_config.to_dict(), quantization=scheme)
    save_checkpoint(folder / "network", network.state_dict(), meta)
    return folder / "network", 4 * numbers
