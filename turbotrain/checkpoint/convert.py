"""Checkpoints from one layout into another: planned, streamed a tensor at a time, written whole or not at all, verified."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from turbotrain.checkpoint import sinks, targets
from turbotrain.checkpoint.atomic import new_file, new_folder
from turbotrain.checkpoint.components import COPIED_UP_TO, folder_bytes
from turbotrain.checkpoint.header import CheckpointProblem
from turbotrain.checkpoint.identify import Identity, Network, identify
from turbotrain.checkpoint.io import MAX_SHARD_BYTES
from turbotrain.checkpoint.keymaps.targets import TARGETS, Target
from turbotrain.checkpoint.layouts import describe
from turbotrain.checkpoint.meta import METADATA_KEY
from turbotrain.checkpoint.plan import Plan, plan_network
from turbotrain.checkpoint.verify import verify
from turbotrain.model.variants import VARIANTS


@dataclasses.dataclass
class Conversion:
    """What was done: the files, what was lost (nothing without `lossy`), what else there is to know, what was verified."""

    files: list[Path]
    losses: list[str]
    notes: list[str]
    verified: list[str]


def convert(
    source: str | Path | Identity,
    output: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    lossy: bool = False,
    force: bool = False,
    verified: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Conversion:
    """Write `source` to `output` in the layout `to`, a key of TARGETS.

    dtype: of the weights outside the float32 islands; dequantizes 8-bit layers. variant: recorded in our metadata. lossy: go on
    where the target cannot hold everything. force: replace what is at `output`. verified: read the result back and compare.
    Raises CheckpointProblem: a source that is none, is incomplete or not finite, an output that cannot be written, a loss
    without `lossy`, a result that differs; OSError when writing fails: what was at `output` is then still there.
    """
    identity = source if isinstance(source, Identity) else identify(source)
    output, target = Path(output).expanduser(), TARGETS[to]
    sources = [file for network in identity.networks.values() for file in network.contents.files]
    targets.check_output([identity.path, *sources], output, target, len(identity.networks), force)
    _check_variant(identity, variant)
    plans = {expert: plan_network(network, to, dtype, variant) for expert, network in identity.networks.items()}
    losses = list(dict.fromkeys(loss for plan in plans.values() for loss in plan.losses))
    if losses and not lossy:
        raise CheckpointProblem(
            f"{identity.path}: {target.label} cannot hold all of it: {'; '.join(losses)} (--lossy goes on)"
        )
    notes = list(dict.fromkeys(note for plan in plans.values() for note in plan.notes))
    notes += _notes(identity, to)
    if to == "turbotrain":
        for expert, network in identity.networks.items():
            if not network.described:
                made_from = [file.name for file in network.contents.files]
                plans[expert].meta.lineage.append({"stage": "convert", "layout": network.layout, "files": made_from})
    described = {expert: to == "turbotrain" or network.described for expert, network in identity.networks.items()}
    files = write_plans(plans, output, to, described, identity, max_shard_bytes)
    proofs = verify(identity, output, to, exact=not losses and dtype is None) if verified else []
    return Conversion(files, losses, notes, proofs)


def _check_variant(identity: Identity, variant: str | None) -> None:
    if variant is None:
        return
    if VARIANTS[variant].config != identity.first.config:
        raise CheckpointProblem(
            f"{identity.path} holds {describe(identity.first.config)}, but --variant {variant} is "
            f"{describe(VARIANTS[variant].config)}; leave it out"
        )


def _notes(identity: Identity, to: str) -> list[str]:
    notes = []
    named = identity.first.meta.components if to == "turbotrain" else {}
    beside = [name for name in identity.beside if name.rstrip("/") not in named.values()]
    if beside:
        notes.append(f"beside the weights lie {', '.join(beside[:8])}: left alone")
    places = {name: value for name, value in named.items() if value.count("/") != 1}  # others are names on a hub
    lost = [name for name, value in places.items() if _component(identity.first, identity.path, value) is None]
    if lost:
        notes.append(
            f"the metadata name {', '.join(lost)}, not to be found beside the source: infer.py needs {lost[0]}=FOLDER"
        )
    whole = [
        str(file) for network in identity.networks.values() if network.contents.whole for file in network.contents.files
    ]
    if whole:
        notes.append(f"{', '.join(whole)}: older than torch 1.6, so it was held in memory whole")
    boundary = VARIANTS[identity.first.meta.variant].boundary if identity.first.meta.variant in VARIANTS else None
    if to == "diffusers" and boundary is not None and len(identity.networks) == 2:
        notes.append(f"the pipeline's model_index.json needs boundary_ratio {boundary}")
    if to == "diffusers" and identity.first.attention.is_sparse:
        notes.append("P is named as FastVideo names it; diffusers itself has no sparse-linear attention")
    return notes


def write_plans(
    plans: Mapping[str, Plan],
    output: Path,
    to: str,
    described: Mapping[str, bool],
    source: Identity | None,
    max_shard_bytes: int,
) -> list[Path]:
    """All networks of a checkpoint, whole or not at all; returns the weights files.

    described: by expert, whether our metadata go into the file (where the layout has a place for them). source: whose
    components our folder takes along or refers to.
    """
    target = TARGETS[to]
    output = output.absolute()
    targets.check_space(output, sum(entry.nbytes for plan in plans.values() for entry in plan.entries.values()))
    if target.suffix and len(plans) == 1:
        with new_file(output) as temporary:
            _write_file(temporary, next(iter(plans.values())), target, all(described.values()))
        return [output]
    files: list[Path] = []
    with new_folder(output) as folder:
        for expert, plan in plans.items():
            place = folder / targets.place_of(expert, target)
            if target.suffix:
                _write_file(place, plan, target, described[expert])
                files.append(place)
                continue
            place.mkdir(exist_ok=True)
            if to == "turbotrain" and source is not None:
                _keep_components(plan, source.networks[expert], source.path, place, folder)
            metadata = _metadata(plan, described[expert])
            files += sinks.write_shards(place, target.stem, plan.entries, metadata, max_shard_bytes)
            if plan.config is not None:
                (place / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n")
        files = [output / file.relative_to(folder) for file in files]
    return files


def _write_file(path: Path, plan: Plan, target: Target, described: bool) -> None:
    if target.suffix == ".pth":
        sinks.write_pickle(path, plan.entries)
    else:
        sinks.write_safetensors(path, plan.entries, _metadata(plan, described))


def _metadata(plan: Plan, described: bool) -> dict[str, str]:
    return {"format": "pt", **({METADATA_KEY: plan.meta.to_json()} if described else {})}


def _component(network: Network, root: Path, value: str) -> Path | None:
    """The folder that a component's path in the metadata means: in the network's folder or, of experts, the one above.

    None for one that is not there, or that leads out of the checkpoint: copying it would write outside of the output.
    """
    if ".." in Path(value).parts:
        return None
    bases = (network.contents.files[0].parent, root)
    return next((base / value for base in bases if (base / value).is_dir()), None)


def _keep_components(plan: Plan, network: Network, root: Path, place: Path, folder: Path) -> None:
    """Small component folders that the source refers to relatively come along; of large ones the path is recorded."""
    kept = dict(plan.meta.components)
    for name, value in plan.meta.components.items():
        found = _component(network, root, value)
        if found is None or Path(value).is_absolute():
            continue
        goal = (place if found == network.contents.files[0].parent / value else folder) / value
        if folder_bytes(found) > COPIED_UP_TO:
            kept[name] = str(found.resolve())
        elif not goal.exists():
            shutil.copytree(found, goal)
    plan.meta.components = kept
