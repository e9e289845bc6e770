"""How self-attention is computed: dense, or SLA (method.md section 3). No torch here: values are checked early."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

KINDS = ("dense", "sla", "sage_sla")
BLOCK_SIZES = (16, 32, 64, 128)
ORDERS = ("raster", "cube")
FEATURE_MAPS = ("softmax", "elu", "relu")
LAYER_TOPKS = (
    0.025,
    0.05,
    0.075,
    0.1,
    0.125,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
)  # what a layer is given where a budget is shared out


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The self-attention of every block of a network.

    kind: `dense`; `sla` (sparse + linear branch, trainable); `sage_sla` (SLA whose sparse branch multiplies in 8 bits,
        inference only). The last two share their weights.
    topk: fraction of key blocks that each query block keeps, in (0, 1]; at least one block is always kept.
    layer_topk: one such fraction for every layer, instead of one for all; topk then is their mean.
    block_q, block_k: tokens per query and per key block.
    order: `raster` (t, h, w; the published checkpoints) or `cube` (each block of tokens is a compact 3-D box).
    feature_map: of the linear branch.
    """

    kind: str = "dense"
    topk: float = 0.1
    block_q: int = 64
    block_k: int = 64
    order: str = "raster"
    feature_map: str = "softmax"
    layer_topk: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        choices = {"kind": KINDS, "block_q": BLOCK_SIZES, "block_k": BLOCK_SIZES, "order": ORDERS}
        for field, allowed in {**choices, "feature_map": FEATURE_MAPS}.items():
            if getattr(self, field) not in allowed:
                options = ", ".join(map(str, allowed))
                raise ValueError(f"attention.{field}={getattr(self, field)!r}: choose one of {options}")
        if isinstance(self.layer_topk, str) or not isinstance(self.layer_topk, Sequence):
            raise ValueError(f"attention.layer_topk={self.layer_topk!r}: expected a list with a top-k for every layer")
        # JSON knows lists only; a tuple keeps the whole hashable.
        object.__setattr__(self, "layer_topk", tuple(self.layer_topk))
        for layer, topk in enumerate(self.layer_topk):
            _check_fraction(f"attention.layer_topk[{layer}]", topk)
        if self.layer_topk:
            if not self.is_sparse:
                raise ValueError(
                    "attention.layer_topk: only sparse attention has a top-k; leave it out with attention.kind=dense"
                )
            object.__setattr__(self, "topk", math.fsum(self.layer_topk) / len(self.layer_topk))
        _check_fraction("attention.topk", self.topk)

    @property
    def is_sparse(self) -> bool:
        return self.kind != "dense"

    def by_layer(self, layers: int) -> list[AttentionConfig]:
        """What each of `layers` layers computes with: one top-k each. Raises ValueError where their number is another."""
        if not self.layer_topk:
            return [self] * layers
        if len(self.layer_topk) != layers:
            raise ValueError(
                f"attention.layer_topk has {len(self.layer_topk)} values for {layers} layers: expected one each, or none for "
                "one top-k in all"
            )
        return [dataclasses.replace(self, topk=topk, layer_topk=()) for topk in self.layer_topk]

    def to_dict(self) -> dict[str, Any]:
        """As checkpoints hold it: `layer_topk` only where it says something, so that other files stay as they were."""
        values = dataclasses.asdict(self)
        layer_topk = list(values.pop("layer_topk"))
        return {**values, "layer_topk": layer_topk} if layer_topk else values

    @classmethod
    def from_dict(cls, values: dict[str, Any], base: AttentionConfig | None = None) -> AttentionConfig:
        """`base` (default: the defaults above) with `values` on top: a top-k for all, or dense attention, takes the place of the
        base's top-k by layer. Unknown names raise ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"attention has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        if "topk" in values or values.get("kind") == "dense":
            values = {"layer_topk": (), **values}
        return dataclasses.replace(base or cls(), **values)


def _check_fraction(field: str, topk: Any) -> None:
    if isinstance(topk, bool) or not isinstance(topk, (int, float)) or not 0 < topk <= 1:
        raise ValueError(
            f"{field}={topk!r}: the fraction of key blocks kept must be above 0 and at most 1 "
            "(0.1 by default, 0.15 for quality, 1.0 keeps all)"
        )
