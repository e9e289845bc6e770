"""What can be known about a folder of shards without torch, so that a bad one is refused before a stage begins.

A shard is an uncompressed tar in webdataset's form. Its headers name every member, where it begins and how long it is: that is
enough to read any sample at any time, which is what makes resuming exact. `dataset.safetensors` beside the shards holds the
embedding of the negative prompt and, as metadata, what there should be: samples and latent shape of every shard.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbotrain.checkpoint.header import CheckpointProblem, read_safetensors_header, turbotrain_metadata
from turbotrain.model.variants import VARIANTS, WanConfig

if TYPE_CHECKING:
    from turbotrain.config import Config

INDEX_FILE = "dataset.safetensors"
LATENT, EMBED, PROMPT, IMAGE, CLIP = "latent.pt", "embed.pt", "prompt.txt", "y.pt", "clip.pt"
PARTS = (LATENT, EMBED, PROMPT)  # what a sample holds where the index does not say
REBUILD = "build or copy the shard again"
_BLOCK = tarfile.BLOCKSIZE
Shape = tuple[int, ...]


class DatasetError(ValueError):
    """Shards that cannot be trained on: which file, what is wrong, and what to do."""


@dataclass(frozen=True)
class Entry:
    """Where one sample lies: {part: (first byte in the shard, length)}. latent_shape: None where the index does not say."""

    shard: Path
    key: str
    parts: Mapping[str, tuple[int, int]]
    latent_shape: Shape | None = None


@dataclass(frozen=True)
class Needs:
    """What a run asks of its data.

    latent_shape: (C, T, H, W) of every sample; of `mixed` data only C counts. parts: members that every sample must have.
    max_bad: samples that may be lost before the data set is refused.
    """

    latent_shape: Shape | None = None
    parts: tuple[str, ...] = ()
    mixed: bool = False
    max_bad: int = 0


@dataclass
class ShardIndex:
    """A data set by its headers. facts: what its index says. problems: what is wrong. lost: samples that are not there."""

    folder: Path
    facts: dict[str, Any]
    parts: tuple[str, ...]
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lost: int = 0

    @property
    def nbytes(self) -> int:
        return sum(length for entry in self.entries for _, length in entry.parts.values())


def needs_of(config: Config) -> Needs:
    """What the stages of a recipe ask of its shards."""
    variant, data = VARIANTS[config.model.variant], config.data
    # The score term alone starts from noise (a low-noise expert's from latents, a given first frame is one), as calibration does.
    score_alone = all(phase.cm == "none" for phase in config.rcm.phases)
    score_alone = score_alone and config.model.expert != "low" and data.first_frame == 0
    latents = bool({"sla", "teacher"} & set(config.stages)) or ("rcm" in config.stages and not score_alone)
    return Needs(
        variant.latent_shape(data.frames, data.height, data.width),
        (*((LATENT,) if latents else ()), *image_parts(variant.config)),
        data.mixed_shapes,
        data.max_bad_samples,
    )


def image_parts(config: WanConfig) -> tuple[str, ...]:
    """The members that hold a network's image conditioning. TI2V networks need none: their first latent frame is the image."""
    if config.model_type != "i2v":
        return ()
    return (IMAGE,) if config.image_dim is None else (IMAGE, CLIP)


def check_shards(folder: Path, needs: Needs | None = None) -> ShardIndex:
    """Read every header of a data set.

    Raises:
        DatasetError: no folder, no shards or no index; latents of another shape, or samples without a part that is needed; more
            than `needs.max_bad` samples lost in shards that are no tar, truncated, empty, incomplete or missing.
    """
    needs = needs or Needs()
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DatasetError(
            f"data: no *.tar shards in {folder}; run the data stage, or set data.path to a folder of shards"
        )
    facts = _read_index(folder / INDEX_FILE)
    index = ShardIndex(folder, facts, tuple(facts.get("parts") or PARTS))
    _check_parts(index, needs)
    told: dict[str, dict[str, Any]] = facts.get("shards") or {}
    for shard in shards:
        _check_shape(index, needs, (told.get(shard.name) or facts).get("latent_shape"))
        entries, problem, lost = scan_shard(shard, index.parts, (told.get(shard.name) or facts).get("latent_shape"))
        index.entries += entries
        index.lost += lost
        index.problems += [problem] if problem else []
    expected = sum(shard["count"] for shard in told.values()) if told else facts.get("count", len(index.entries))
    if expected != len(index.entries):
        index.lost = max(index.lost, abs(expected - len(index.entries)))
        index.problems.append(
            f"data: {folder} holds {len(index.entries)} samples, {INDEX_FILE} says {expected}: a shard is missing or damaged; "
            "copy or build the shards again"
        )
    refuse_beyond(needs.max_bad, index.lost, index.problems)
    if not index.entries:
        raise DatasetError(f"data: {folder} holds no sample that can be read; build the shards again")
    return index


def refuse_beyond(max_bad: int, lost: int, problems: Sequence[str]) -> None:
    """Raises DatasetError with the first problem when more samples are lost than may be."""
    if lost <= max_bad:
        return
    more = f" ({lost} samples are lost in all, data.max_bad_samples={max_bad} may be)" if max_bad else ""
    raise DatasetError(problems[0] + more)


def scan_shard(
    shard: Path, parts: Sequence[str], latent_shape: Sequence[int] | None = None
) -> tuple[list[Entry], str, int]:
    """(whole samples, what is wrong or "", samples seen to be lost) of one tar."""
    members, problem = _members(shard)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        key, _, part = name.partition(".")
        if member.isfile() and key and part:
            key = f"{folder}/{key}" if folder else key
            samples.setdefault(key, {})[part] = (member.offset_data, member.size)
    if not samples:
        return [], problem or f"data: {shard} holds no samples; remove it, or build the shards again", 1
    shape = tuple(latent_shape) if latent_shape else None
    entries, lost = [], 0
    for key, found in samples.items():
        missing = [part for part in parts if part not in found]
        if missing:
            lost += 1
            problem = problem or f"data: {shard}, sample {key}: no {', '.join(missing)}; {REBUILD}"
        else:
            entries.append(Entry(shard, key, {part: found[part] for part in parts}, shape))
    return entries, problem, max(lost, bool(problem))


def _members(shard: Path) -> tuple[list[tarfile.TarInfo], str]:
    """The members that lie wholly in the file, and what is wrong with it or "".

    tarfile takes a damaged header for the end of the archive, and a streaming reader a truncated archive for a short one: so
    where the members end there must be a block of zeros.
    """
    members: list[tarfile.TarInfo] = []
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            while (member := archive.next()) is not None:
                if member.offset_data + member.size > size:
                    return members, f"data: {shard} is truncated in {member.name}; {REBUILD}"
                members.append(member)
            end = archive.offset
    except (tarfile.TarError, EOFError, OSError) as error:
        state = "is truncated" if members else "is not a readable tar"
        return members, f"data: {shard} {state} ({error}); {REBUILD}"
    with shard.open("rb") as file:
        # After the last member's data, rounded up to a block.
        file.seek(_after(members[-1]) if members else 0)
        closing = file.read(_BLOCK)
    if members and 0 < len(closing) < _BLOCK:
        return members, f"data: {shard} is truncated after {members[-1].name}; {REBUILD}"
    if members and closing.strip(b"\0"):
        return members, f"data: {shard} has a damaged header at byte {min(end, _after(members[-1]))}; {REBUILD}"
    return members, ""


def _after(member: tarfile.TarInfo) -> int:
    return member.offset_data + -(-member.size // _BLOCK) * _BLOCK


def _check_parts(index: ShardIndex, needs: Needs) -> None:
    missing = [part for part in needs.parts if part not in index.parts]
    if LATENT in missing:
        raise DatasetError(
            f"data: {index.folder} holds prompts only, no {LATENT}: they serve rcm alone, with phases of "
            "{cm: none, dmd: true}; build latents for all else"
        )
    if missing:
        raise DatasetError(
            f"data: {index.folder} holds no {', '.join(missing)}, which an image-to-video network reads; build the "
            "shards with this variant"
        )


def _check_shape(index: ShardIndex, needs: Needs, written: Sequence[int] | None) -> None:
    """Data of several shapes is taken only when it is asked for: a batch of an unexpected shape costs unexpected memory."""
    expected, written = tuple(needs.latent_shape or ()), tuple(written or ())
    if not expected or not written:
        return
    if expected[0] != written[0] or (expected != written and not needs.mixed):
        hint = "" if expected[0] != written[0] or not index.facts.get("shards") else ", or set data.mixed_shapes=true"
        raise DatasetError(
            f"data: {index.folder} holds latents of shape {written}, expected {expected}; "
            f"the shards were made for another resolution, length or VAE{hint}"
        )


def _read_index(index: Path) -> dict[str, Any]:
    if not index.is_file():
        raise DatasetError(f"data: {index} is missing; it holds the empty prompt's embedding. Build the shards again")
    try:
        return turbotrain_metadata(index, read_safetensors_header(index)) or {}
    except (CheckpointProblem, json.JSONDecodeError) as error:
        raise DatasetError(f"data: {index} cannot be read ({error}); build the shards again") from error
