"""Files of low-rank adapters: written as diffusers names them, read under several names, added to a checkpoint.

A file holds `transformer.blocks.N.attn1.to_q.lora_A.weight` (R, K) and `.lora_B.weight` (N, R), the scale alpha / rank in B, so
that a reader who knows no alpha adds what was trained. The adapter of an SLA network also brings its P, whole: diffusers,
which has no SLA, then refuses the file, while it loads that of a dense network. What it changes of P is the way from the base's P
to its own; a base without one has the P that SLA begins with, which is zero.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from turbotrain.checkpoint import header, layouts, targets
from turbotrain.checkpoint.atomic import new_file
from turbotrain.checkpoint.convert import write_plans
from turbotrain.checkpoint.header import CheckpointProblem
from turbotrain.checkpoint.identify import Identity, Network, identify, shorten
from turbotrain.checkpoint.io import MAX_SHARD_BYTES, read_tensors
from turbotrain.checkpoint.keymaps.targets import TARGETS
from turbotrain.checkpoint.merge import P_OF_SLA, require_mergeable
from turbotrain.checkpoint.meta import METADATA_KEY, CheckpointMeta
from turbotrain.checkpoint.plan import plan_network
from turbotrain.checkpoint.stream import Entry
from turbotrain.model.lora import add_change

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
PREFIX = "transformer."
_FACTOR = re.compile(r"^(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_down|lora_up)(\.default)?\.weight$")
_SAME = {"lora_down": "lora_A", "lora_up": "lora_B"}


def save_lora(path: Path, change: Mapping[str, Tensor], meta: CheckpointMeta) -> None:
    """Write the adapter `change` (native names: `X.lora_A.weight`, `X.lora_B.weight`, P), whole or not at all."""
    named = {PREFIX + name: tensor.detach().cpu() for name, tensor in layouts.to_layout(change, "diffusers").items()}
    with new_file(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in named.items()},
            temporary,
            metadata={METADATA_KEY: meta.to_json(), "format": "pt"},
        )


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], CheckpointMeta | None]:
    """(the adapter under native names, with every scale in B; what turbotrain wrote beside it, None for files of others).

    Names of diffusers and PEFT, and native ones as ComfyUI and LightX2V write them, with `lora_A`, `lora_B` or `lora_down`,
    `lora_up`, and `alpha`. Raises CheckpointProblem: no adapter, half an adapter, or tensors that are none of these.
    """
    tensors = read_tensors(path)
    change: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    strange = []
    for name, tensor in tensors.items():
        native = layouts.native_name(name.removeprefix(PREFIX))
        factor = None if native is None else _FACTOR.match(native)
        if native is None:
            strange.append(name)
        elif factor is not None:
            change[f"{factor['module']}.{_SAME.get(factor['kind'], factor['kind'])}.weight"] = tensor
        elif native.endswith(".alpha"):
            alphas[native.removesuffix(".alpha")] = float(tensor)
        elif P_OF_SLA in native:
            change[native] = tensor
        else:
            strange.append(name)
    if not any(name.endswith(".lora_A.weight") for name in change):
        raise CheckpointProblem(
            f"{path}: no LoRA, it has no lora_A or lora_down tensors (such as {shorten(strange, 3)})"
        )
    if strange:
        raise CheckpointProblem(
            f"{path}: {len(strange)} tensors are no low-rank factors of a Wan network's layers: {shorten(sorted(strange), 4)}"
        )
    for name in [name for name in change if P_OF_SLA not in name]:
        module, factor, _ = name.rsplit(".", 2)
        other = change.get(f"{module}.{'lora_B' if factor == 'lora_A' else 'lora_A'}.weight")
        if other is None:
            raise CheckpointProblem(f"{path}: {module} has only {factor}; {header.AGAIN}")
        if factor == "lora_B" and module in alphas:
            change[name] = change[name] * (alphas[module] / other.shape[0])
    metadata = header.inspect_checkpoint(path).metadata
    return change, None if metadata is None else CheckpointMeta.from_dict(metadata, str(path))


def merge_lora(
    base: str | Path,
    lora: str | Path,
    output: str | Path,
    weight: float = 1.0,
    *,
    to: str = "turbotrain",
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write base + weight (B A), and P moved by `weight` of its way to the adapter's, in the layout `to`, a tensor at a time, in
    the base's dtype; returns the files.

    Raises CheckpointProblem: two experts, 8-bit weights, an adapter of another network, an output that cannot be written or
    cannot hold SLA's P; OSError when writing fails: what was at `output` is then still there.
    """
    output = Path(output).expanduser()
    pair = header.expert_folders(Path(base).expanduser())
    if pair is not None:
        raise CheckpointProblem(f"{base} holds two experts; name the one that the LoRA is for: {pair[0]} or {pair[1]}")
    identity = identify(base)
    network = identity.first
    require_mergeable("base", network)
    targets.check_output([identity.path, Path(lora)], output, TARGETS[to], 1, force)
    merged = with_lora(network, *read_lora(lora), str(lora), weight)
    plan = plan_network(merged, to)
    if plan.losses:
        raise CheckpointProblem(f"{TARGETS[to].label} cannot hold all of it: {'; '.join(plan.losses)}")
    described = {"": to == "turbotrain" or network.described}
    return write_plans({"": plan}, output, to, described, Identity(identity.path, {"": merged}, []), max_shard_bytes)


def with_lora(
    network: Network, change: Mapping[str, Tensor], said: CheckpointMeta | None, source: str, weight: float
) -> Network:
    """`network` with the adapter added, none of its tensors read. Raises CheckpointProblem: of another network."""
    entries = dict(network.native)
    wrong = []
    for name, tensor in change.items():
        if P_OF_SLA in name:
            held = network.native.get(name)
            if held is not None and held.shape != tuple(tensor.shape):
                wrong.append(f"{name} ({tuple(tensor.shape)} for one of shape {held.shape})")
            entries[name] = _moved(held, tensor, weight)
            continue
        if name.endswith(".lora_B.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        high_NR, held = change[f"{module}.lora_B.weight"], entries.get(f"{module}.weight")
        if held is None or held.shape != (high_NR.shape[0], tensor.shape[1]) or high_NR.shape[1] != tensor.shape[0]:
            found = "no such layer" if held is None else f"a layer of shape {held.shape}"
            wrong.append(f"{module} ({tuple(high_NR.shape)} x {tuple(tensor.shape)} for {found})")
        else:
            entries[f"{module}.weight"] = _changed(held, tensor, high_NR, weight)
    if wrong:
        raise CheckpointProblem(
            f"{source}: a LoRA of another network than {layouts.describe(network.config)}: {len(wrong)} of its layers do not "
            f"fit: {shorten(wrong, 3)}"
        )
    entry = {"stage": "lora", "weight": weight, "files": [Path(source).name]}
    meta = dataclasses.replace(network.meta, lineage=[*network.meta.lineage, entry])
    brings_p, has_p = (any(P_OF_SLA in name for name in names) for names in (change, network.native))
    if said is not None:
        sampler = said.sampler or meta.sampler
        attention = said.attention if brings_p or not has_p else meta.attention  # a dense adapter leaves SLA as it is
        meta = dataclasses.replace(meta, attention=attention, sampler=sampler)
        # With its whole weight it is what its own training ended with.
        meta = dataclasses.replace(meta, lineage=[*said.lineage] if weight == 1 else [*said.lineage, entry])
    elif brings_p and not has_p:
        # The base has no SLA yet, and the file does not say which: as every file with P and without metadata is read.
        meta = dataclasses.replace(meta, attention=layouts.infer_attention(change).to_dict())
    return dataclasses.replace(network, native=entries, meta=meta)


def _moved(held: Entry | None, tensor: Tensor, weight: float) -> Entry:
    """P on its way from the base's (zero where it has none) to the adapter's: at weights 0 and 1 these to the bit."""

    def read() -> Tensor:
        target = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        start = torch.zeros_like(target) if held is None else held.read().to(target.dtype)
        return torch.lerp(start, target, weight).to(tensor.dtype if held is None else getattr(torch, held.dtype))

    dtype = str(tensor.dtype).removeprefix("torch.") if held is None else held.dtype
    return Entry(tuple(tensor.shape), dtype, read)


def _changed(held: Entry, low_RK: Tensor, high_NR: Tensor, weight: float) -> Entry:
    def read() -> Tensor:
        return add_change(held.read(), low_RK, high_NR, weight).to(getattr(torch, held.dtype))

    return Entry(held.shape, held.dtype, read)
