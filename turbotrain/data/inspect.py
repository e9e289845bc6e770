"""What a data set holds, by its headers and by its numbers.

Legend: N samples, C channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbotrain.data.latents import LatentDataset
from turbotrain.data.shards import LATENT, Needs


@dataclass
class Moments:
    """Of every channel of the latents that were looked at, in float64."""

    count: int = 0
    total_C: Tensor | float = 0.0
    squares_C: Tensor | float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, latent_CTHW: Tensor) -> None:
        numbers = latent_CTHW.double().flatten(1)
        self.count += numbers.shape[1]
        self.total_C = self.total_C + numbers.sum(1)
        self.squares_C = self.squares_C + numbers.square().sum(1)
        self.low, self.high = min(self.low, float(numbers.min())), max(self.high, float(numbers.max()))

    def to_dict(self) -> dict[str, Any]:
        mean_C = torch.as_tensor(self.total_C) / self.count
        std_C = (torch.as_tensor(self.squares_C) / self.count - mean_C.square()).clamp(min=0).sqrt()
        return {"mean": mean_C.tolist(), "std": std_C.tolist(), "min": self.low, "max": self.high}


@dataclass
class Report:
    """samples: that can be read. lost: that cannot, and problems: why. buckets: one entry a latent shape."""

    folder: str
    samples: int
    lost: int
    problems: list[str]
    shards: int
    nbytes: int
    parts: list[str]
    source: dict[str, Any]
    prompts: dict[str, Any] = field(default_factory=dict)
    buckets: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(folder: Path, looked_at: int | None = None) -> tuple[Report, LatentDataset]:
    """Headers of all samples, numbers of up to `looked_at` of each shape (None: all); damage is told, not refused.

    Raises:
        DatasetError: no folder, no index, or nothing in it can be read.
    """
    dataset = LatentDataset(folder, Needs(mixed=True, max_bad=1 << 62), memory_bytes=0)
    index = dataset.index
    lengths: list[int] = []
    given: set[str] = set()
    buckets = []
    for members in dataset.buckets:
        moments = Moments() if LATENT in index.parts else None
        for number in _spread(members, looked_at):
            sample = dataset.look(number)
            if sample is None:
                continue
            lengths.append(int(sample.embed_LD.any(dim=1).sum()))
            given.add(sample.prompt)
            if moments is not None and sample.latent_CTHW is not None:
                moments.add(sample.latent_CTHW)
        shape = index.entries[members[0]].latent_shape
        numbers = moments.to_dict() if moments is not None and moments.count else {}
        buckets.append({"latent_shape": shape and list(shape), "samples": len(members), **numbers})
    report = Report(
        str(folder),
        len(dataset) - len(dataset.problems),
        dataset.bad_samples,
        [*index.problems, *dataset.problems],
        len({entry.shard for entry in index.entries}),
        index.nbytes,
        list(index.parts),
        {key: value for key, value in index.facts.items() if key not in ("shards", "skipped")},
        buckets=buckets,
    )
    if lengths:
        report.prompts = {
            "looked_at": len(lengths),
            "distinct": len(given),
            "tokens": {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)},
        }
    return report, dataset


def _spread(members: list[int], count: int | None) -> Iterator[int]:
    """`count` of the members, evenly spread."""
    if count is None or count >= len(members):
        yield from members
    else:
        yield from (members[i * len(members) // count] for i in range(count))
