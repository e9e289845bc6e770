"""How self-attention is computed: dense, or SLA (method.md section 3). No torch here: values are checked early."""

from __future__ import annotations

import dataclasses
from typing import Any

KINDS = ("dense", "sla", "sage_sla")
BLOCK_SIZES = (16, 32, 64, 128)
ORDERS = ("raster", "cube")
FEATURE_MAPS = ("softmax", "elu", "relu")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The self-attention of every block of a network.

    kind: `dense`; `sla` (sparse + linear branch, trainable); `sage_sla` (SLA whose sparse branch multiplies in 8 bits,
        inference only). The last two share their weights.
    topk: fraction of key blocks that each query block keeps, in (0, 1]; at least one block is always kept.
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

    def __post_init__(self) -> None:
        choices = {"kind": KINDS, "block_q": BLOCK_SIZES, "block_k": BLOCK_SIZES, "order": ORDERS}
        for field, allowed in {**choices, "feature_map": FEATURE_MAPS}.items():
            if getattr(self, field) not in allowed:
                options = ", ".join(map(str, allowed))
                raise ValueError(f"attention.{field}={getattr(self, field)!r}: choose one of {options}")
        if isinstance(self.topk, bool) or not isinstance(self.topk, (int, float)) or not 0 < self.topk <= 1:
            raise ValueError(
                f"attention.topk={self.topk!r}: the fraction of key blocks kept must be above 0 and at most 1 "
                "(0.1 by default, 0.15 for quality, 1.0 keeps all)"
            )

    @property
    def is_sparse(self) -> bool:
        return self.kind != "dense"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], base: AttentionConfig | None = None) -> AttentionConfig:
        """`base` (default: the defaults above) with `values` on top. Unknown names raise ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"attention has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        return dataclasses.replace(base or cls(), **values)
