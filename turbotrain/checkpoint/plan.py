"""What a conversion will write, tensor by tensor, before any of them is read, and what it would lose.

Every step maps unread tensors to unread tensors; 8-bit values are carried unchanged wherever the target has a place for them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from turbokernels.w8a8.api import dequantize_weight, quantize_weight, scale_shape

from turbotrain.checkpoint import layouts, targets
from turbotrain.checkpoint.header import CheckpointProblem
from turbotrain.checkpoint.identify import Network, shorten
from turbotrain.checkpoint.keymaps import scaled
from turbotrain.checkpoint.keymaps.targets import COMFYUI_FORMATS, TARGETS, Target
from turbotrain.checkpoint.meta import CheckpointMeta
from turbotrain.checkpoint.stream import Entry, is_floating
from turbotrain.checkpoint.structure import BLOCK_LINEAR
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.quant_linear import BLOCK_VECTORS
from turbotrain.model.wan import FLOAT32_ISLANDS

# Every value of the second dtypes is one of the first.
_HOLDS = {
    "float32": ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"),
    "bfloat16": ("float8_e4m3fn", "float8_e5m2"),
    "float16": ("float8_e4m3fn", "float8_e5m2"),
}


@dataclasses.dataclass
class Plan:
    """One network's tensors as they will be written.

    entries: by the names in the file. meta: of the result; config: its config.json. losses: what the target cannot hold.
    notes: what else a user should know.
    """

    entries: dict[str, Entry]
    meta: CheckpointMeta
    config: dict[str, Any] | None
    losses: list[str]
    notes: list[str]


@dataclasses.dataclass
class _Quantized:
    """An 8-bit layer: what is stored, and the vectors (K,) that divide its input."""

    weight: Entry
    scale: Entry
    scheme: str
    smooth: list[Entry]

    def dequantized(self) -> Entry:
        """The float32 weight (N, K) that it stands for."""

        def read() -> Tensor:
            return _unsmoothed(dequantize_weight(self.weight.read(), self.scale.read(), self.scheme), self.smooth)

        return Entry(self.weight.shape, "float32", read)


def _unsmoothed(weight_NK: Tensor, smooth: list[Entry]) -> Tensor:
    vectors = [entry.read() for entry in smooth]
    return weight_NK / math.prod(vectors[1:], start=vectors[0]) if vectors else weight_NK


def plan_network(network: Network, layout: str, dtype: str | None = None, variant: str | None = None) -> Plan:
    """How `network` becomes one of `layout` (a key of TARGETS).

    dtype: of the floating-point weights outside the float32 islands, which also dequantizes; None keeps what is there.
    variant: recorded instead of the one that was recognised. Raises CheckpointProblem: an incomplete network, or what the
    target cannot hold even with losses.
    """
    network.require_complete()
    target = TARGETS[layout]
    plan = Plan(dict(network.native), dataclasses.replace(network.meta), None, [], [])
    if variant:
        plan.meta.variant = variant
    _say_what_reading_left_out(plan, network)
    if not target.sla:
        _drop_projections(plan, target)
    if dtype is not None:
        _cast(plan, dtype)
    elif network.scheme is not None:
        _requantize(plan, network, target)
    if target.config_json:
        plan.config = targets.config_json(network.config, layout)
    _say_what_is_misread(plan, network, target)
    if not target.metadata and network.described:
        said = ("sampler", "lineage", "license", "components")
        kept = [field for field in said if getattr(network.meta, field)]
        if kept:
            plan.notes.append(f"{target.label} has no metadata; not carried: {', '.join(kept)}")
    _rename(plan, layout, target)
    return plan


def _say_what_reading_left_out(plan: Plan, network: Network) -> None:
    for what, names in network.unused.items():
        said = plan.losses if names[0].rpartition(".")[2] in scaled.INPUT_SCALES else plan.notes
        said.append(f"{len(names)} {what} are dropped")
    bare = [layouts.strip_wrappers(name) for name in network.contents.entries]
    outside = [name for name in bare if name.endswith(scaled.SCALES) and not name.startswith("blocks.")]
    if outside:
        plan.losses.append(f"{len(outside)} 8-bit layers outside of blocks become float32")


def _drop_projections(plan: Plan, target: Target) -> None:
    projections = [name for name in plan.entries if ".proj_l." in name]
    if projections:
        plan.losses.append(
            f"{target.label} has no sparse-linear attention: {len(projections)} tensors of P are dropped"
        )
        plan.entries = {name: entry for name, entry in plan.entries.items() if name not in projections}
        plan.meta.attention = AttentionConfig().to_dict()


def _cast(plan: Plan, dtype: str) -> None:
    layers, plan.entries = _take_quantized(plan.entries)
    if layers:
        plan.losses.append(f"{len(layers)} 8-bit layers are multiplied out to {dtype}")
        plan.entries.update({f"{name}.weight": layer.dequantized() for name, layer in layers.items()})
        plan.meta.quantization = None
    rounded = set()
    for name, entry in plan.entries.items():
        layer = name.removesuffix(".weight")
        if not is_floating(entry.dtype) or entry.dtype == dtype or FLOAT32_ISLANDS.search(name):
            continue
        if layer not in layers and entry.dtype not in _HOLDS[dtype]:
            rounded.add(entry.dtype)
        plan.entries[name] = _as_dtype(entry, dtype)
    if rounded:
        plan.losses.append(f"{' and '.join(sorted(rounded))} weights are rounded to {dtype}")
    plan.meta.dtype = dtype


def _as_dtype(entry: Entry, dtype: str) -> Entry:
    return Entry(entry.shape, dtype, lambda: entry.read().to(getattr(torch, dtype)))


def _take_quantized(entries: dict[str, Entry]) -> tuple[dict[str, _Quantized], dict[str, Entry]]:
    """(8-bit layers, the rest with SmoothQuant's vectors taken out of float layers)."""
    layers: dict[str, _Quantized] = {}
    rest = dict(entries)
    for name in entries:
        layer, _, kind = name.rpartition(".")
        if kind not in ("int8_weight", "fp8_weight"):
            continue
        scale = rest.pop(f"{layer}.scale")
        tiled = "int8_block128" if len(scale.shape) == 2 else "int8_channel"
        own = rest.pop(f"{layer}.smooth", None)
        scheme = tiled if kind == "int8_weight" else "fp8_channel"
        layers[layer] = _Quantized(rest.pop(name), scale, scheme, [] if own is None else [own])
    for name in list(rest):
        block, _, vector = name.rpartition(".")
        if vector not in BLOCK_VECTORS:
            continue
        smooth = rest.pop(name)
        for linear in BLOCK_VECTORS[vector]:
            layer = f"{block}.{linear}"
            if layer in layers:
                layers[layer].smooth.append(smooth)
            else:
                rest[f"{layer}.weight"] = _without_smoothing(rest[f"{layer}.weight"], smooth)
    return layers, rest


def _without_smoothing(weight: Entry, smooth: Entry) -> Entry:
    def read() -> Tensor:
        return _unsmoothed(weight.read().float(), [smooth]).to(getattr(torch, weight.dtype))

    return Entry(weight.shape, weight.dtype, read)


def _requantize(plan: Plan, network: Network, target: Target) -> None:
    """Carry 8-bit layers as they are where the target holds them, and quantize the others anew (a loss)."""
    if not target.schemes:
        raise CheckpointProblem(
            f"{network.path}: {target.label} holds no 8-bit weights; --dtype bfloat16 --lossy multiplies them out"
        )
    if target.smooth:
        return  # ours holds everything
    layers, rest = _take_quantized(plan.entries)
    smoothed = {name for name in plan.entries if name.rpartition(".")[2] in ("smooth", *BLOCK_VECTORS)}
    preferred = target.schemes[0]
    anew = [name for name, layer in layers.items() if layer.smooth or not _fits(layer, target)]
    for name, layer in layers.items():
        weight, scale, scheme = layer.weight, layer.scale, layer.scheme
        if name in anew:
            weight, scale = _quantized_anew(layer.dequantized(), preferred)
            scheme = preferred
        kind = "fp8_weight" if scheme == "fp8_channel" else "int8_weight"
        rest.update({f"{name}.{kind}": weight, f"{name}.scale": scale})
    if anew:
        before = " and ".join(sorted({layers[name].scheme for name in anew}))
        plan.losses.append(
            f"{len(anew)} {before} layers are quantized anew as {preferred}, the only int8 that {target.label} holds"
        )
    if smoothed:
        plan.losses.append(f"{len(smoothed)} SmoothQuant vectors, for which {target.label} has no place, are taken out")
    if target.metadata is False:  # TurboDiffusion quantizes all block linears or none
        floating = [n for n in rest if n.endswith(".weight") and BLOCK_LINEAR.fullmatch(n.removesuffix(".weight"))]
        for name in floating:
            layer = name.removesuffix(".weight")
            rest[f"{layer}.int8_weight"], rest[f"{layer}.scale"] = _quantized_anew(
                _as_dtype(rest.pop(name), "float32"), preferred
            )
        if floating:
            plan.losses.append(f"{len(floating)} layers that were kept in float are quantized: {shorten(floating, 3)}")
        anew += floating
    plan.entries = rest
    if anew or smoothed:
        plan.meta.quantization = {"scheme": preferred}


def _fits(layer: _Quantized, target: Target) -> bool:
    """Whether a target of other projects holds these very values; ComfyUI's fp8 has one scale for the whole tensor."""
    if layer.scheme != "fp8_channel":
        return layer.scheme in target.schemes
    return layer.scheme in target.schemes and bool((scale_N := layer.scale.read()).eq(scale_N[0]).all())


def _quantized_anew(weight: Entry, scheme: str) -> tuple[Entry, Entry]:
    return (
        Entry(weight.shape, "int8", lambda: quantize_weight(weight.read(), scheme)[0]),
        Entry(scale_shape(scheme, *weight.shape), "float32", lambda: quantize_weight(weight.read(), scheme)[1]),
    )


def _say_what_is_misread(plan: Plan, network: Network, target: Target) -> None:
    """Compare what the files will tell a reader who does not know our metadata with what the network is."""
    if target.smooth:
        return
    shapes = {name: entry.shape for name, entry in plan.entries.items()}
    config = network.config.to_dict()
    try:
        hints = layouts.config_hints(plan.config or {})
        read = layouts.infer_config(shapes, hints, str(network.path)).to_dict()
        wrong = [f"{key}={config[key]} as {read[key]}" for key in config if config[key] != read[key]]
    except CheckpointProblem:
        wrong = [f"num_heads={config['num_heads']} not at all"]
    if wrong:
        plan.losses.append(f"{target.label} does not say everything: it would be read with {', '.join(wrong)}")
    attention = AttentionConfig.from_dict(plan.meta.attention)
    published = dataclasses.replace(layouts.PUBLISHED_SLA, kind=attention.kind)
    if attention.is_sparse and attention != published and not target.metadata:
        ours = ", ".join(f"{f}={v}" for f, v in attention.to_dict().items() if v != published.to_dict().get(f))
        plan.losses.append(f"{target.label} does not say how attention is sparse: {ours} would be read as published")


def _rename(plan: Plan, layout: str, target: Target) -> None:
    if layout == "turbotrain":
        return
    entries = plan.entries if layout != "comfyui" else _comfyui_names(plan.entries)
    base = {"rcm": "turbodiffusion", "comfyui": "official"}.get(layout, layout)
    try:
        named = layouts.to_layout(entries, base)
    except ValueError as error:
        raise CheckpointProblem(str(error).replace(f"layout={base!r}", target.label)) from error
    plan.entries = {target.prefix + name: entry for name, entry in named.items()}


def _comfyui_names(entries: dict[str, Entry]) -> dict[str, Entry]:
    layers, rest = _take_quantized(entries)
    for name, layer in layers.items():
        marker = json.dumps({"format": COMFYUI_FORMATS[layer.scheme]}).encode()
        rest[f"{name}.weight"] = layer.weight
        rest[f"{name}.weight_scale"] = _comfyui_scale(layer)
        rest[f"{name}.comfy_quant"] = Entry((len(marker),), "uint8", _bytes(marker))
    return rest


def _comfyui_scale(layer: _Quantized) -> Entry:
    """(N, 1), one scale for every row of an int8 weight; a scalar for an fp8 one."""
    if layer.scheme == "fp8_channel":
        return Entry((), "float32", lambda: layer.scale.read()[0].clone())
    return layer.scale.reshape((*layer.scale.shape, 1))


def _bytes(data: bytes) -> Callable[[], Tensor]:
    return lambda: torch.frombuffer(bytearray(data), dtype=torch.uint8)
