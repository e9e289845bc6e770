"""What flows into each linear while the float model samples: per-channel extremes, and a few rows to measure errors on.

Shape suffixes: R sampled rows, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from turbotrain.quant.sites import model_sites

# One forward pass (or a whole sampling run) with the model it is given; its result is compared between models.
ForwardCall = Callable[[nn.Module], Any]
# Rows that one forward pass may add to a site's sample: many passes then share it.
ROWS_PER_PASS = 32


class InputStats:
    """Per-channel absmax (K,) over all rows seen, and a uniform sample of at most `max_rows` rows (R, K).

    The sample is a reservoir (every row offered so far is kept with equal probability), drawn from its own seeded
    generator.
    """

    def __init__(self, max_rows: int, seed: int) -> None:
        self.max_rows = max_rows
        self.absmax_K: Tensor | None = None
        self._rows: list[Tensor] = []
        self._n_offered = 0
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor) -> None:
        """Take in one input (..., K)."""
        x_RK = x.detach().flatten(0, -2)
        absmax_K = x_RK.abs().amax(0).float()
        self.absmax_K = absmax_K if self.absmax_K is None else torch.maximum(self.absmax_K, absmax_K)
        chosen = torch.randperm(x_RK.shape[0], generator=self._generator)[:ROWS_PER_PASS]
        for row in chosen.tolist():
            self._n_offered += 1
            if len(self._rows) < self.max_rows:
                self._rows.append(x_RK[row].clone())
                continue
            slot = int(torch.randint(self._n_offered, (), generator=self._generator))
            if slot < self.max_rows:
                self._rows[slot] = x_RK[row].clone()

    @property
    def rows_RK(self) -> Tensor:
        return torch.stack(self._rows).float()


@torch.no_grad()
def observe(
    model: nn.Module, calls: Iterable[ForwardCall], max_rows: int = 256, seed: int = 0
) -> dict[str, InputStats]:
    """Run the calls and return the statistics of every site, by the full name of its first linear.

    Errors: ValueError without calls, for a linear that no call reaches, and for an input that is not finite.
    """
    stats: dict[str, InputStats] = {}
    handles = []
    for index, (block_name, block, site) in enumerate(model_sites(model)):
        stat = stats[f"{block_name}.{site.linears[0]}"] = InputStats(max_rows, seed + index)

        def hook(module: nn.Module, args: tuple[Any, ...], stat: InputStats = stat) -> None:
            stat.add(args[0])

        handles.append(block.get_submodule(site.linears[0]).register_forward_pre_hook(hook))
    n_calls = 0
    try:
        for call in calls:
            call(model)
            n_calls += 1
    finally:
        for handle in handles:
            handle.remove()
    if not n_calls:
        raise ValueError("calibration got no forward calls: pass at least one prompt's sampling run")
    for name, stat in stats.items():
        if stat.absmax_K is None:
            raise ValueError(
                f"no calibration call reached {name}: the calls must run the whole model, image branch included"
            )
        if not stat.absmax_K.isfinite().all():
            raise ValueError(
                f"the input of {name} is NaN or Inf during calibration: check the checkpoint and the prompts"
            )
    return stats
