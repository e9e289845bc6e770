"""Builds a data set from a list of items, by any number of workers, each of which may be killed and started again.

Items are taken in ranges of a shard's size; range r is built by worker r mod n, item by item, into one shard for each size of
clip in it. A finished range leaves `.ranges/{r:06d}.json`; whoever finds that the last range is there writes the index. What is
in a shard depends on the list and the settings alone, so it matters neither how many workers there were nor how often they died.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from turbotrain.checkpoint.atomic import new_file
from turbotrain.data.shards import DatasetError, scan_shard
from turbotrain.data.sources import Item, fingerprint
from turbotrain.data.writing import Sample, ShardFile, write_index

SETTINGS_FILE = "build.json"
RANGES = ".ranges"


class Maker(Protocol):
    """Makes samples of items.

    parts: the members of every sample. together: how many items are best made in one call.
    """

    parts: tuple[str, ...]
    together: int

    def make(self, indices: Sequence[int], items: Sequence[Item]) -> Iterator[tuple[str, Sample | Exception]]:
        """(bucket, sample) of each item in its turn, or why there is none."""
        ...

    def negative(self) -> Tensor:
        """(L, D) embedding of the negative prompt."""
        ...


@dataclass
class Progress:
    """What a worker did. skipped: {item: why}; kept: samples that earlier attempts had made."""

    made: int = 0
    kept: int = 0
    skipped: dict[int, str] = field(default_factory=dict)
    facts: dict[str, Any] | None = None  # of the index, when this worker found everything there


@dataclass(frozen=True)
class Plan:
    """worker: this one's number, of `workers`. max_bad: items that this worker may skip before it gives up."""

    folder: Path
    samples_per_shard: int = 256
    worker: int = 0
    workers: int = 1
    max_bad: int = 0


def build(
    plan: Plan,
    items: Sequence[Item],
    maker: Maker,
    settings: Mapping[str, object],
    say: Callable[[str], None] = print,
) -> Progress:
    """Build this worker's ranges, then the index if nothing is left.

    Args:
        settings: all that shapes the samples; recorded, and compared with those of earlier attempts and other workers.

    Raises:
        DatasetError: the folder was begun with other settings; another process builds the same range; more than `max_bad`
            items could not be made.
    """
    recorded = {
        **settings,
        "items": len(items),
        "list": fingerprint(items),
        "samples_per_shard": plan.samples_per_shard,
    }
    _agree(plan.folder, recorded)
    progress = Progress()
    size = plan.samples_per_shard
    ranges = range(-(-len(items) // size))
    for number in ranges:
        if number % plan.workers == plan.worker and not _marker(plan.folder, number).is_file():
            _build_range(plan, number, items, maker, progress, say)
    left = [number for number in ranges if not _marker(plan.folder, number).is_file()]
    if left:
        say(f"{len(left)} of {len(ranges)} ranges are left to other workers")
    else:
        progress.facts = finish(plan.folder, maker.negative())
    return progress


def finish(folder: Path, negative_LD: Tensor) -> dict[str, Any]:
    """Write the index of a folder whose shards are all there; returns what it says."""
    settings_file = folder / SETTINGS_FILE
    settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
    done = [json.loads(marker.read_text()) for marker in sorted((folder / RANGES).glob("*.json"))]
    skipped = {item: why for marker in done for item, why in marker["skipped"].items()}
    return write_index(folder, negative_LD, {**settings, **({"skipped": skipped} if skipped else {})})


def _agree(folder: Path, settings: Mapping[str, object]) -> None:
    path = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        if folder.is_dir() and any(folder.glob("*.tar")):
            raise DatasetError(f"{folder} holds shards of another origin; choose another output")
        with new_file(path) as new:
            new.write_text(json.dumps(wanted, indent=1, ensure_ascii=False))
        return
    begun = json.loads(path.read_text())
    changed = [key for key in {**begun, **wanted} if begun.get(key) != wanted.get(key)]
    if changed:
        key = changed[0]
        raise DatasetError(
            f"{folder} was begun with {key}={begun.get(key)!r}, now it is {wanted.get(key)!r}; choose another output, or "
            "the same settings to go on"
        )


def _build_range(
    plan: Plan, number: int, items: Sequence[Item], maker: Maker, progress: Progress, say: Callable[[str], None]
) -> None:
    first = number * plan.samples_per_shard
    wanted = range(first, min(first + plan.samples_per_shard, len(items)))
    began = time.perf_counter()
    with ExitStack() as open_files:
        shards: dict[str, ShardFile] = {}

        def shard(bucket: str) -> ShardFile:
            if bucket not in shards:
                path = plan.folder / _shard_name(number, bucket)
                shards[bucket] = open_files.enter_context(ShardFile(path, maker.parts))
            return shards[bucket]

        done = _keys_of_finished_shards(plan.folder, number, maker.parts)
        for partial in sorted(plan.folder.glob(f".{number:06d}-*.tar.partial")):
            done |= shard(partial.name.removeprefix(f".{number:06d}-").removesuffix(".tar.partial")).done
        todo = [index for index in wanted if _key(index) not in done]
        progress.kept += len(wanted) - len(todo)
        skipped: dict[int, str] = {}
        made = 0
        for at in range(0, len(todo), maker.together):
            indices = todo[at : at + maker.together]
            for index, (bucket, made_of) in zip(
                indices, maker.make(indices, [items[index] for index in indices]), strict=True
            ):
                if isinstance(made_of, Sample):
                    shard(bucket).write(_key(index), made_of.members())
                    made += 1
                    continue
                skipped[index] = progress.skipped[index] = " ".join(str(made_of).split())
                say(f"item {index} skipped: {skipped[index]}")
                if len(progress.skipped) > plan.max_bad:
                    raise DatasetError(
                        f"item {index}: {skipped[index]} ({len(progress.skipped)} items could not be made, --max-bad "
                        f"is {plan.max_bad}); mend the list, or allow more"
                    ) from made_of
        for opened in shards.values():
            opened.finish()
    progress.made += made
    with new_file(_marker(plan.folder, number)) as new:
        new.write_text(json.dumps({"samples": len(wanted) - len(skipped), "skipped": skipped}, ensure_ascii=False))
    rate = made / max(time.perf_counter() - began, 1e-9)
    say(f"range {number}: {made} made ({rate:.3g} a second), {len(done)} kept, {len(skipped)} skipped")


def _keys_of_finished_shards(folder: Path, number: int, parts: Sequence[str]) -> set[str]:
    """A range may have been killed between naming its first shard and its last."""
    found: set[str] = set()
    for path in folder.glob(f"{number:06d}-*.tar"):
        entries, problem, _ = scan_shard(path, parts)
        if problem:
            raise DatasetError(problem)
        found |= {entry.key for entry in entries}
    return found


def _key(index: int) -> str:
    return f"{index:09d}"


def _shard_name(number: int, bucket: str) -> str:
    return f"{number:06d}-{bucket}.tar"


def _marker(folder: Path, number: int) -> Path:
    return folder / RANGES / f"{number:06d}.json"
