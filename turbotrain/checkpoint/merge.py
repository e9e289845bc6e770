"""W = base + w (target - anchor): what a training changed, added to another network (method.md, section 5).

SLA and rCM trained apart: base rCM, target SLA, anchor their teacher. Wan 2.2's experts with rCM's change of Wan 2.1: base an
expert, target rCM, anchor Wan 2.1. The rule is strict: a tensor that the three do not share is an error, unless it is P of
SLA, or a pattern says what becomes of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from turbotrain.checkpoint import targets
from turbotrain.checkpoint.convert import write_plans
from turbotrain.checkpoint.header import CheckpointProblem
from turbotrain.checkpoint.identify import Identity, Network, identify, identify_network, shorten
from turbotrain.checkpoint.io import MAX_SHARD_BYTES
from turbotrain.checkpoint.keymaps.targets import TARGETS
from turbotrain.checkpoint.plan import plan_network
from turbotrain.checkpoint.stream import Entry
from turbotrain.checkpoint.verify import compare_tensors
from turbotrain.model.attention_config import AttentionConfig

P_OF_SLA = ".proj_l."


@dataclasses.dataclass(frozen=True)
class MergeKeys:
    """What becomes of every tensor: merged by the formula; added, from the target; kept, from the base; dropped."""

    merged: list[str]
    added: list[str]
    kept: list[str]
    dropped: list[str]


@dataclasses.dataclass(frozen=True)
class Merge:
    """What was done: the files, and by expert ("" for one network) the weight and the tensors' fates."""

    files: list[Path]
    weights: dict[str, float]
    keys: dict[str, MergeKeys]
    verified: list[str]


def merge_keys(
    base: Collection[str],
    target: Collection[str],
    anchor: Collection[str],
    keep: Sequence[str] = (),
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> MergeKeys:
    """Sort the names of three networks. keep, add, drop: patterns (anywhere in a name), looked at in the order drop, keep, add.

    P of SLA needs no pattern where one of base and target alone has it. Raises CheckpointProblem that lists what the three do
    not share.
    """
    keys = MergeKeys([], [], [], [])
    strange: dict[str, list[str]] = {}
    for name in sorted({*base, *target, *anchor}):
        has = (name in base, name in target, name in anchor)
        if _matches(drop, name):
            keys.dropped.append(name)
        elif name in base and _matches(keep, name):
            keys.kept.append(name)
        elif name in target and _matches(add, name):
            keys.added.append(name)
        elif all(has):
            keys.merged.append(name)
        elif P_OF_SLA in name and has == (False, True, False):
            keys.added.append(name)
        elif P_OF_SLA in name and has == (True, False, False):
            keys.kept.append(name)
        else:
            owners = " and ".join(owner for owner, owns in zip(("base", "target", "anchor"), has) if owns)
            strange.setdefault(owners, []).append(name)
    if strange:
        if strange.keys() == {"base and target"} and all(P_OF_SLA in name for name in strange["base and target"]):
            raise CheckpointProblem(
                "merge: the base has SLA's projections as the target has: it was trained from an SLA network "
                "(rcm.composition=sequential) and needs no merge; name a dense base (rcm.composition=merge), or say whether to "
                "keep (the base's) or add (the target's) projections"
            )
        said = "; ".join(f"{len(names)} in {owners} only: {shorten(names, 6)}" for owners, names in strange.items())
        raise CheckpointProblem(
            f"merge: the networks differ in more than SLA's projections: {said}; say which tensors to keep (the base's), add "
            "(the target's) or drop"
        )
    return keys


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def merge_tensor(base: Tensor, target: Tensor, anchor: Tensor, weight: float) -> Tensor:
    """base + weight (target - anchor), computed in float32 or better, in base's dtype."""
    wide = torch.float64 if torch.float64 in (base.dtype, target.dtype, anchor.dtype) else torch.float32
    merged = target.to(wide) - anchor.to(wide)
    # In place: of three networks' tensors the largest decides how much memory a merge takes.
    return merged.mul_(weight).add_(base.to(wide)).to(base.dtype)


def require_mergeable(role: str, network: Network) -> None:
    """Raises CheckpointProblem for a network that is incomplete or has 8-bit weights."""
    network.require_complete()
    if network.scheme is not None:
        raise CheckpointProblem(
            f"{network.path}: the {role} has 8-bit weights, which cannot be added; merge before quantization, or multiply "
            "them out: tools/convert.py --dtype bfloat16 --lossy"
        )


def merge_networks(
    base: Network, target: Network, anchor: Network, weight: float, keys: MergeKeys, any_dtype: bool = False
) -> Network:
    """`base` with merged tensors, none of them read. any_dtype: the three may differ in dtype (the base's stays).

    Raises CheckpointProblem: tensors that differ in shape or dtype, networks that differ in their number of heads.
    """
    three = {"base": base, "target": target, "anchor": anchor}
    heads = {role: network.config.num_heads for role, network in three.items()}
    if len(set(heads.values())) > 1:
        raise CheckpointProblem(f"merge: the networks differ in heads: {heads}")
    for what, of in (("shape", lambda entry: entry.shape), ("dtype", lambda entry: entry.dtype)):
        wrong = [
            f"{name} ({', '.join(f'{role} {of(network.native[name])}' for role, network in three.items())})"
            for name in keys.merged
            if len({of(network.native[name]) for network in three.values()}) > 1
        ]
        if wrong and not (what == "dtype" and any_dtype):
            remedy = (
                "keep such tensors of the base"
                if what == "shape"
                else "their difference holds rounding; allow it, or convert them"
            )
            raise CheckpointProblem(f"merge: {len(wrong)} tensors differ in {what}: {shorten(wrong, 4)}; {remedy}")
    entries: dict[str, Entry] = {}
    merged, added, kept = set(keys.merged), set(keys.added), set(keys.kept)
    for name in base.native | target.native:
        if name in merged:
            entries[name] = _merged(base.native[name], target.native[name], anchor.native[name], weight)
        elif name in added:
            entries[name] = target.native[name]
        elif name in kept:
            entries[name] = base.native[name]
    has_p = any(P_OF_SLA in name for name in entries)
    sparse = base.attention if base.attention.is_sparse else target.attention
    meta = dataclasses.replace(
        base.meta,
        attention=(sparse if has_p else AttentionConfig()).to_dict(),
        sampler=base.meta.sampler or target.meta.sampler,
        lineage=[*base.meta.lineage, _record(three, weight)],
    )
    return dataclasses.replace(base, native=entries, meta=meta)


def _merged(base: Entry, target: Entry, anchor: Entry, weight: float) -> Entry:
    return Entry(base.shape, base.dtype, lambda: merge_tensor(base.read(), target.read(), anchor.read(), weight))


def _record(three: Mapping[str, Network], weight: float) -> dict[str, object]:
    files = {role: [file.name for file in network.contents.files] for role, network in three.items()}
    return {"stage": "merge", "weight": weight, "files": files}


def merge(
    base: str | Path,
    target: str | Path,
    anchor: str | Path,
    output: str | Path,
    weights: Mapping[str, float],
    *,
    to: str = "turbotrain",
    keep: Sequence[str] = (),
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
    any_dtype: bool = False,
    force: bool = False,
    verified: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Merge:
    """Write the merged checkpoint to `output`. A target or anchor of one network serves both experts of the base.

    weights: {"": w}, for two experts also {"high": w, "low": w}. Other arguments: `merge_keys`, `merge_networks`, `convert`.
    Raises CheckpointProblem: see there; OSError when writing fails: what was at `output` is then still there.
    """
    three = [identify(path) for path in (base, target, anchor)]
    experts = list(three[0].networks)
    targets.check_output([identity.path for identity in three], Path(output), TARGETS[to], len(experts), force)
    for role, identity in zip(("base", "target", "anchor"), three):
        for network in identity.networks.values():
            require_mergeable(role, network)
        if list(identity.networks) not in ([""], experts):
            raise CheckpointProblem(
                f"{identity.path}: the {role} has two experts, the base one network; name one of them"
            )
    if set(weights) not in ({""}, set(experts)):
        wanted = (
            "two experts: a weight each, high=W low=W, or one for both"
            if len(experts) == 2
            else "one network: one weight"
        )
        raise CheckpointProblem(f"{three[0].path} has {wanted}")
    output = Path(output).expanduser()
    used: dict[str, float] = {}
    keys: dict[str, MergeKeys] = {}
    merged: dict[str, Network] = {}
    for expert in experts:
        networks = [identity.networks.get(expert, identity.first) for identity in three]
        used[expert] = weights[expert] if expert in weights else weights[""]
        names = [set(network.native) for network in networks]
        keys[expert] = merge_keys(names[0], names[1], names[2], keep, add, drop)
        merged[expert] = merge_networks(networks[0], networks[1], networks[2], used[expert], keys[expert], any_dtype)
    plans = {expert: plan_network(network, to) for expert, network in merged.items()}
    losses = list(dict.fromkeys(loss for plan in plans.values() for loss in plan.losses))
    if losses:
        raise CheckpointProblem(
            f"{TARGETS[to].label} cannot hold all of it: {'; '.join(losses)}; merge to turbotrain first"
        )
    described = {expert: to == "turbotrain" or network.described for expert, network in merged.items()}
    files = write_plans(plans, output, to, described, Identity(three[0].path, merged, []), max_shard_bytes)
    said = []
    if verified:
        for expert, place in targets.written_places(output, to, experts).items():
            compare_tensors(merged[expert].native, identify_network(place).native, place)
            said.append(f"{expert} {len(merged[expert].native)} tensors equal the sum computed again".strip())
    return Merge(files, used, keys, said)
