"""Which samples make up the global batch of a step, and reading a rank's share of it before it is needed.

Both are functions of (seed, step), so any step can come first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from torch import Tensor

from turbotrain.data.latents import Batch, LatentDataset
from turbotrain.training.graphs import FixedRandom
from turbotrain.training.seeding import StepRandom, derive_seed, epoch_order


class BatchOrder:
    """Batches of one bucket each, drawn from every bucket in proportion to its size.

    A bucket is drawn in epochs: each of its samples once, in an order of that epoch, across the borders of batches. In a round
    every bucket has about as many batches as it fills, at least one, and the round's order is shuffled.
    """

    def __init__(self, seed: int, buckets: Sequence[Sequence[int]], batch_size: int) -> None:
        self.buckets = buckets
        self.batch_size = batch_size
        # One bucket has the order that it has always had.
        self._seeds = [seed if len(buckets) == 1 else derive_seed(seed, "bucket", i) for i in range(len(buckets))]
        self._round_seed = derive_seed(seed, "rounds")
        self._batches = [max(1, round(len(bucket) / batch_size)) for bucket in buckets]
        self._orders: dict[tuple[int, int], list[int]] = {}
        self._round: tuple[int, list[int]] = (-1, [])

    def at(self, step: int) -> list[int]:
        """Indices of the samples of a step's global batch, all from one bucket."""
        number, position = divmod(step, sum(self._batches))
        order = self._order_of_round(number)
        bucket = order[position]
        drawn = (number * self._batches[bucket] + order[:position].count(bucket)) * self.batch_size
        return [self._sample(bucket, drawn + offset) for offset in range(self.batch_size)]

    def _order_of_round(self, number: int) -> list[int]:
        if self._round[0] != number:
            slots = [bucket for bucket, count in enumerate(self._batches) for _ in range(count)]
            self._round = (number, [slots[i] for i in epoch_order(self._round_seed, number, len(slots))])
        return self._round[1]

    def _sample(self, bucket: int, drawn: int) -> int:
        members = self.buckets[bucket]
        epoch, offset = divmod(drawn, len(members))
        if (bucket, epoch) not in self._orders:
            # A batch straddles at most two epochs unless it is larger than the bucket.
            self._orders = {
                key: order for key, order in self._orders.items() if key[0] != bucket or key[1] >= epoch - 1
            }
            self._orders[bucket, epoch] = epoch_order(self._seeds[bucket], epoch, len(members))
        return members[self._orders[bucket, epoch][offset]]


class FixedPart:
    """A micro-batch whose tensors stay where they are from step to step: what a CUDA graph can read."""

    def __init__(self) -> None:
        self.random = FixedRandom()
        self._batch: Batch | None = None

    def take(self, batch: Batch, random: StepRandom) -> tuple[Batch, StepRandom]:
        """`batch`, whose tensors no step wrote before, in this part's own, and the draws of `random`."""
        self.random.begin(random)
        if self._batch is None:
            self._batch = batch
        else:
            for own, new in zip(_tensors(self._batch), _tensors(batch), strict=True):
                own.copy_(new)
        return replace(self._batch, prompts=batch.prompts), self.random


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.embed_BLD] if batch.latents_BCTHW is None else [batch.embed_BLD, batch.latents_BCTHW]


class BatchReader:
    """A rank's share of every global batch, one batch for each of `positions`; what is not in memory is read a step ahead.

    metrics: of the latest step: seconds that it waited for data, samples lost so far on this rank, and, of what is read from
    files, MB a second.
    """

    def __init__(self, dataset: LatentDataset, seed: int, batch_size: int, positions: Sequence[range]) -> None:
        self.dataset = dataset
        self.positions = positions
        self.metrics: dict[str, float] = {}
        self._order = BatchOrder(seed, dataset.buckets, batch_size)
        self._thread = None if dataset.in_memory else ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def at(self, step: int) -> list[Batch]:
        began = time.perf_counter()
        batches = self._read(step) if self._thread is None else self._awaited(step, self._thread)
        self.metrics = {"data_wait": time.perf_counter() - began, "bad_samples": float(self.dataset.bad_samples)}
        if self._thread is not None:
            self.metrics["data_mb_per_s"] = self.dataset.mb_per_second
        return batches

    def _awaited(self, step: int, thread: ThreadPoolExecutor) -> list[Batch]:
        expected, self._ahead = self._ahead, None
        future = expected[1] if expected is not None and expected[0] == step else thread.submit(self._read, step)
        batches = future.result()
        self._ahead = (step + 1, thread.submit(self._read, step + 1))
        return batches

    def _read(self, step: int) -> list[Batch]:
        indices = self._order.at(step)
        return [self.dataset.batch([indices[position] for position in part]) for part in self.positions]
