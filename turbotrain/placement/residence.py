"""Networks placed on a device as a setting says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from turbotrain.placement.budget import Setting
from turbotrain.placement.swap import Swap


class Residence:
    """Puts networks (the experts of one variant) where `setting` wants them; they are then called as ever.

    networks: WanTransformers for inference; for `model` and `blocks` best on the host, so that a GPU without room for them never
    sees them whole.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device, setting: Setting | None = None) -> None:
        self.setting = setting or Setting()
        for network in networks:
            for block in _blocks(network):
                block.ffn_rows = self.setting.ffn_rows
        self._swap: Swap | None = None
        if self.setting.offload == "none":
            for network in networks:
                network.to(device)
            return
        count = len(_blocks(networks[0]))
        kept = count if self.setting.offload == "model" else min(count, self.setting.kept_blocks)
        self._swap = Swap([[network, *_blocks(network)] for network in networks], device, kept=kept)

    @property
    def swaps(self) -> bool:
        """Whether the networks are on the device only while they compute."""
        return self._swap is not None

    def release(self) -> None:
        """Frees what the networks take while another part computes; their next call brings them back."""
        if self._swap is not None:
            self._swap.release()


def _blocks(network: Any) -> list[Any]:
    return list(network.blocks)
