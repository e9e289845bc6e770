"""Latents and text embeddings for training: what every stage reads, so that no step runs the VAE.

A folder of shards in webdataset's form (`shards.py`, `writing.py`), each sample `{index:09d}.latent.pt`, `.embed.pt`,
`.prompt.txt` (the layout that rCM's data uses), for image-to-video `.y.pt` and `.clip.pt` too. A data set that is small stays in
memory; of a larger one each sample is read where it lies when its turn comes. Either way sample i is a function of the files
alone: any step of a run can be computed first, on any rank, so nothing about the data needs to be saved.

Legend: B batch, C channels, T latent frames, H, W latent height and width, L tokens, D their width.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from turbotrain.checkpoint.io import load_tensor
from turbotrain.conditioning import MASK_CHANNELS, Conditioning
from turbotrain.data.shards import (
    CLIP,
    EMBED,
    IMAGE,
    INDEX_FILE,
    LATENT,
    PROMPT,
    REBUILD,
    DatasetError,
    Entry,
    Needs,
    check_shards,
    refuse_beyond,
)
from turbotrain.data.writing import Sample
from turbotrain.diffusion.velocity import clean_frame_mask


@dataclass(frozen=True)
class Batch:
    """Samples of one shape, float32. latents_BCTHW: None for a data set of prompts only."""

    latents_BCTHW: Tensor | None
    embed_BLD: Tensor
    prompts: list[str]
    latent_shape: tuple[int, int, int, int]
    conditioning: Conditioning = field(default_factory=Conditioning)

    @property
    def latent_BCTHW(self) -> Tensor:
        if self.latents_BCTHW is None:
            raise DatasetError(
                "data: these shards hold prompts only, but this step starts from latents; use phases of {cm: none, dmd: true}"
            )
        return self.latents_BCTHW

    @property
    def loss_mask(self) -> Tensor | None:
        """(B, 1, T, 1, 1), False on latent frames that conditioning fixes; None where there are none."""
        clean_BT = self.conditioning.clean_frames_BT
        return None if clean_BT is None else clean_frame_mask(clean_BT)

    def with_first_frame(self, chosen_B: Tensor) -> Batch:
        """TI2V: the chosen samples are given their first latent frame. It codes the first image and nothing else (the VAE is
        causal), so the samples themselves are the conditioning."""
        latent = self.latent_BCTHW
        clean_BT = torch.zeros(len(latent), latent.shape[2], dtype=torch.bool, device=latent.device)
        clean_BT[:, 0] = chosen_B
        clean = Conditioning(clean_BCTHW=latent, clean_frames_BT=clean_BT)
        return Batch(latent, self.embed_BLD, self.prompts, self.latent_shape, clean)


class LatentDataset:
    """The samples of a folder of shards, addressed by index.

    A sample that turns out to be bad is counted, and its place is taken by the next good one of its shape: which one that is
    depends on the files alone, so a run that continues elsewhere sees the same.

    Args:
        needs: what is expected of the data; a `latent_shape` of None takes what there is.
        memory_bytes: up to this size the whole data set is kept in memory.

    Raises:
        DatasetError: what `check_shards` finds; more than `needs.max_bad` samples that hold no tensor, would run code, are not
            finite or of another shape than they should be.
    """

    def __init__(self, folder: Path, needs: Needs | None = None, memory_bytes: float = float("inf")) -> None:
        self.folder = folder
        self.needs = needs or Needs()
        self.index = check_shards(folder, self.needs)
        self.facts = self.index.facts
        try:
            with safe_open(folder / INDEX_FILE, framework="pt") as file:
                self.negative_LD = file.get_tensor("negative_embed")
        except SafetensorError as error:
            raise DatasetError(
                f"data: {folder / INDEX_FILE} cannot be read ({error}); build the shards again"
            ) from error
        self.device = torch.device("cpu")
        self._read_bytes, self._read_seconds = 0, 0.0
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()  # a loader may read ahead in a thread of its own
        self.in_memory = self.index.nbytes <= memory_bytes
        self._kept = {i: sample for i in range(len(self)) if (sample := self._read(i))} if self.in_memory else {}

    def __len__(self) -> int:
        return len(self.index.entries)

    @property
    def bad_samples(self) -> int:
        """Samples found to be lost or bad so far."""
        return self.index.lost + len(self._bad)

    @property
    def problems(self) -> list[str]:
        """Why samples that were read so far are bad."""
        return list(self._bad.values())

    @property
    def mb_per_second(self) -> float:
        """Of all that was read and decoded so far."""
        return self._read_bytes / 1e6 / self._read_seconds if self._read_seconds else 0.0

    @cached_property
    def buckets(self) -> list[list[int]]:
        """Indices by latent shape, in the order of their first sample: a batch is drawn from one bucket."""
        found: dict[tuple[int, ...] | None, list[int]] = {}
        for index, entry in enumerate(self.index.entries):
            found.setdefault(entry.latent_shape, []).append(index)
        return list(found.values())

    def to(self, device: torch.device) -> LatentDataset:
        """Batches are made on `device`; what is in memory moves there now, so that a step copies nothing from the host."""
        self.device = device
        self.negative_LD = self.negative_LD.to(device)
        self._kept = {index: _moved(sample, device) for index, sample in self._kept.items()}
        return self

    def look(self, index: int) -> Sample | None:
        """Sample `index` itself, None where it is bad."""
        return self._kept.get(index) or self._read(index)

    def prompt(self, index: int) -> str:
        return self.sample(index).prompt

    def batch(self, indices: Sequence[int]) -> Batch:
        """float32 tensors of these samples, which must be of one shape, on the data set's device."""
        rows = [self.sample(index) for index in indices]
        latents = self._stack([row.latent_CTHW for row in rows])
        shape = tuple(latents.shape[1:]) if latents is not None else self.needs.latent_shape
        if shape is None or len(shape) != 4:
            raise DatasetError(f"data: {self.folder}: latents have shape {shape}, expected (C, T, H, W)")
        image = Conditioning(self._stack([row.y_CTHW for row in rows]), self._stack([row.clip_LD for row in rows]))
        embeds = self._stack([row.embed_LD for row in rows])
        assert embeds is not None  # every sample has one
        return Batch(latents, embeds, [row.prompt for row in rows], shape, image)

    def sample(self, index: int) -> Sample:
        """Sample `index`, or the next good one of its shape."""
        while (sample := self.look(index)) is None:
            bucket = next(bucket for bucket in self.buckets if index in bucket)
            if all(other in self._bad for other in bucket):
                raise DatasetError(f"data: {self.folder} holds no good sample of this shape; build the shards again")
            index = bucket[(bucket.index(index) + 1) % len(bucket)]
        return sample

    def _stack(self, tensors: list[Tensor | None]) -> Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        return torch.stack(there).to(self.device).float() if there else None

    def _read(self, index: int) -> Sample | None:
        """The sample, in float16 on the CPU; None for a bad one, which is counted once."""
        if index in self._bad:
            return None
        entry = self.index.entries[index]
        began = time.perf_counter()
        try:
            sample = self._decode(entry)
            self._read_seconds += time.perf_counter() - began
            self._read_bytes += sum(length for _, length in entry.parts.values())
            return sample
        except ValueError as error:
            with self._lock:
                self._bad[index] = str(error)
            refuse_beyond(self.needs.max_bad, self.bad_samples, [*self.index.problems, *self.problems])
            return None

    def _decode(self, entry: Entry) -> Sample:
        where = f"data: {entry.shard}, sample {entry.key}"
        data: dict[str, bytes] = {}
        with entry.shard.open("rb") as file:
            for part, (first, length) in entry.parts.items():
                file.seek(first)
                data[part] = file.read(length)
        tensors: dict[str, Tensor] = {}
        for part in data.keys() - {PROMPT}:
            name, stored = part.removesuffix(".pt"), load_tensor(data[part], where)
            expected = self._shape(entry, part)
            # Before anything touches the numbers: a few bytes can describe a view of any size.
            if expected and tuple(stored.shape) != expected:
                raise DatasetError(
                    f"data: {entry.shard.name}, sample {entry.key}: {name} has shape {tuple(stored.shape)}, expected {expected}; "
                    "the shards were made for another resolution, length or text encoder"
                )
            tensors[part] = stored.half()
            if not torch.isfinite(tensors[part]).all():
                raise DatasetError(f"{where}: the {name} holds NaN, Inf or numbers too large for float16; {REBUILD}")
        try:
            prompt = data[PROMPT].decode()
        except UnicodeDecodeError as error:
            raise DatasetError(f"{where}: the prompt is not UTF-8 text; {REBUILD}") from error
        return Sample(tensors.get(LATENT), tensors[EMBED], prompt, tensors.get(IMAGE), tensors.get(CLIP))

    def _shape(self, entry: Entry, part: str) -> tuple[int, ...] | None:
        """What is known of a part's shape."""
        latent = entry.latent_shape or self.needs.latent_shape
        if part == EMBED:
            return tuple(self.negative_LD.shape)
        if part == CLIP:
            return tuple(self.facts.get("clip_shape") or ()) or None
        # y: mask channels beside the channels of the conditioning latent.
        return latent if part == LATENT or latent is None else (MASK_CHANNELS + latent[0], *latent[1:])


def _moved(sample: Sample, device: torch.device) -> Sample:
    return replace(sample, **{k: v.to(device) for k, v in vars(sample).items() if isinstance(v, Tensor)})
