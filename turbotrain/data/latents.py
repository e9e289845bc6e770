"""Shards of latents and text embeddings: what every training stage reads, so that no step runs the VAE.

A folder of webdataset shards, each sample `{index:09d}.latent.pt`, `.embed.pt`, `.prompt.txt` (the layout that rCM's data
uses, formats shared with its trainer), beside `dataset.safetensors`, which holds the embedding of the empty prompt
and, as metadata, counts and shapes. Tensors are stored in float16.

Legend: B batch, C channels, T latent frames, H, W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from webdataset.handlers import reraise_exception
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import ShardWriter

from turbotrain.checkpoint.io import load_tensor
from turbotrain.data.shards import INDEX_FILE, REBUILD, DatasetError, check_shards


@dataclass(frozen=True)
class Sample:
    latent_CTHW: Tensor
    embed_LD: Tensor
    prompt: str


@dataclass(frozen=True)
class Batch:
    latent_BCTHW: Tensor
    embed_BLD: Tensor
    prompts: list[str]


def write_shards(
    folder: Path, samples: Iterable[Sample], negative_LD: Tensor, samples_per_shard: int, source: dict[str, object]
) -> int:
    """Write a data set; the folder bears its name only when it is complete. Returns the number of samples.

    Args:
        negative_LD: embedding of the empty (negative) prompt.
        source: what the samples are, recorded as it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        count, latent_shape = 0, None
        pattern = str(partial).replace("%", "%%") + "/train-%06d.tar"
        with ShardWriter(pattern, maxcount=samples_per_shard, verbose=0) as sink:
            for sample in samples:
                latent_shape = list(sample.latent_CTHW.shape)
                sink.write(
                    {
                        "__key__": f"{count:09d}",
                        "latent.pt": _tensor_bytes(sample.latent_CTHW),
                        "embed.pt": _tensor_bytes(sample.embed_LD),
                        "prompt.txt": sample.prompt,
                    }
                )
                count += 1
        facts = {"count": count, "latent_shape": latent_shape, "embed_shape": list(negative_LD.shape), **source}
        negative = {"negative_embed": negative_LD.half().contiguous()}
        save_file(negative, partial / INDEX_FILE, metadata={"turbotrain": json.dumps(facts)})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


class LatentDataset:
    """All samples of a folder of shards, in memory (float16), addressed by index.

    Raises:
        DatasetError: what `check_shards` finds; a sample that is not finite or of another shape than `latent_shape`.
        CheckpointProblem: a `.pt` that holds no tensor, or would run code.
    """

    def __init__(self, folder: Path, latent_shape: Sequence[int] | None = None) -> None:
        self.folder = folder
        self.facts = check_shards(folder, latent_shape)
        try:
            with safe_open(folder / INDEX_FILE, framework="pt") as file:
                self.negative_LD = file.get_tensor("negative_embed")
        except SafetensorError as error:
            raise DatasetError(
                f"data: {folder / INDEX_FILE} cannot be read ({error}); build the shards again"
            ) from error
        expected = tuple(latent_shape or self.facts["latent_shape"])
        embed_shape = tuple(self.negative_LD.shape)
        latents, embeds, self.prompts = [], [], []
        for shard in sorted(folder.glob("*.tar")):
            for key, latent, embed, prompt in _read_shard(shard):
                for part, tensor, shape in (("latent", latent, expected), ("embed", embed, embed_shape)):
                    if tuple(tensor.shape) != shape:
                        raise DatasetError(
                            f"data: {shard.name}, sample {key}: {part} has shape {tuple(tensor.shape)}, expected {shape}; "
                            "the shards were made for another resolution, length or text encoder"
                        )
                latents.append(latent)
                embeds.append(embed)
                self.prompts.append(prompt)
        self.latent_NCTHW = torch.stack(latents)
        self.embed_NLD = torch.stack(embeds)

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device) -> LatentDataset:
        """Keep the tensors on `device`, so that a step copies nothing from the host."""
        self.latent_NCTHW = self.latent_NCTHW.to(device)
        self.embed_NLD = self.embed_NLD.to(device)
        self.negative_LD = self.negative_LD.to(device)
        return self

    def batch(self, indices: Sequence[int]) -> Batch:
        """float32 tensors of these samples."""
        where = torch.tensor(indices, device=self.latent_NCTHW.device)
        return Batch(
            self.latent_NCTHW[where].float(), self.embed_NLD[where].float(), [self.prompts[i] for i in indices]
        )


def _read_shard(shard: Path) -> Iterator[tuple[str, Tensor, Tensor, str]]:
    """The samples of one shard, whose headers were checked: (key, latent, embed, prompt), tensors in float16."""
    # From an open file: webdataset's own opener reads a path as a URL pattern, and refuses to run on several ranks.
    with shard.open("rb") as stream:
        members = tar_file_expander([{"url": str(shard), "stream": stream}], handler=reraise_exception)
        for sample in group_by_keys(members, handler=reraise_exception):
            where = f"data: {shard}, sample {sample['__key__']}"
            latent, embed = (load_tensor(sample[part], where).half() for part in ("latent.pt", "embed.pt"))
            for part, tensor in (("latent", latent), ("embed", embed)):
                if not torch.isfinite(tensor).all():
                    raise DatasetError(
                        f"{where}: the {part} holds NaN, Inf or numbers too large for float16; {REBUILD}"
                    )
            yield sample["__key__"], latent, embed, sample["prompt.txt"].decode()


def _tensor_bytes(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor.half().cpu().contiguous().clone(), buffer)
    return buffer.getvalue()
