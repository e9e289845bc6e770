"""What a file or folder is: layout, variant, experts, attention, quantization, dtype, and what it lacks.

safetensors are identified from their headers, without torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from turbotrain.checkpoint import header, layouts
from turbotrain.checkpoint.header import CheckpointProblem
from turbotrain.checkpoint.keymaps import others, scaled, turbodiffusion, wrappers
from turbotrain.checkpoint.meta import CheckpointMeta
from turbotrain.checkpoint.stream import Contents, Entry, open_contents
from turbotrain.checkpoint.structure import BLOCK_LINEAR, Shape, compare
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, WanConfig, variants_with

LABELS = {
    "turbotrain": "turbotrain",
    "official": "official Wan names (unquantized ComfyUI files have the same)",
    "diffusers": "diffusers",
    "turbodiffusion": "TurboDiffusion",
    "rcm": "rCM training or teacher file (net. prefix)",
    "comfyui": "ComfyUI",
    "lightx2v": "LightX2V",
}


@dataclasses.dataclass(frozen=True)
class Network:
    """One network's files.

    native: its tensors under native names, unread. layout: a key of `LABELS`. stripped: wrappers around its names.
    described: it brought our metadata; otherwise `meta` is what shapes, names and config.json tell. missing, unexpected,
    wrong: against the network that `meta` describes. unused: {what they are: tensors that no network reads}.
    """

    path: Path
    contents: Contents
    native: dict[str, Entry]
    layout: str
    stripped: list[str]
    meta: CheckpointMeta
    missing: list[str]
    unexpected: list[str]
    wrong: list[str]
    unused: dict[str, list[str]]

    @property
    def described(self) -> bool:
        return self.contents.metadata is not None

    @property
    def config(self) -> WanConfig:
        return WanConfig.from_dict(self.meta.config)

    @property
    def attention(self) -> AttentionConfig:
        return AttentionConfig.from_dict(self.meta.attention)

    @property
    def scheme(self) -> str | None:
        """Of the 8-bit layers, from the tensors; None where there are none."""
        return layouts.quantization_scheme(self.shapes)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.native.items()}

    @property
    def problems(self) -> str:
        """What keeps it from being loaded; "" when nothing does."""
        listed = (("missing", self.missing), ("unexpected", self.unexpected), ("of the wrong shape", self.wrong))
        return "; ".join(f"{len(names)} {what}: {shorten(names)}" for what, names in listed if names)

    def require_complete(self) -> None:
        """Raises CheckpointProblem when the files are not exactly one network's."""
        if self.problems:
            raise CheckpointProblem(f"{self.path}: does not fit {layouts.describe(self.config)}: {self.problems}")


@dataclasses.dataclass(frozen=True)
class Identity:
    """A checkpoint: its networks, {"": network} or {"high": ..., "low": ...} (noise), and what lies beside them."""

    path: Path
    networks: dict[str, Network]
    beside: list[str]

    @property
    def first(self) -> Network:
        return next(iter(self.networks.values()))


def identify(path: str | Path) -> Identity:
    """Raises CheckpointProblem: no readable checkpoint, no Wan transformer (what it is instead), or two experts that do not
    belong together.
    """
    path = Path(path).expanduser()
    if path.is_dir() and any(path.glob("*.distcp")):
        raise CheckpointProblem(
            f"{path}: a distributed training checkpoint; gather it first: python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth"
        )
    pair = header.expert_folders(path)
    places = {"": path} if pair is None else dict(zip(("high", "low"), pair))
    networks = {expert: identify_network(place) for expert, place in places.items()}
    if pair is not None:
        _check_pair(path, networks["high"], networks["low"])
        for network in networks.values():
            two = [name for name in variants_with(network.config) if len(VARIANTS[name].experts) == 2]
            if two and not network.described:  # Wan 2.1 14B has the same dimensions, but one network
                network.meta.variant = two[0]
    files = {file.name for network in networks.values() for file in network.contents.files}
    own = {place.name for place in places.values()} | {"config.json", "transformer"}
    listed = sorted(path.iterdir()) if path.is_dir() else []
    beside = [
        item.name + "/" * item.is_dir()
        for item in listed
        if item.name not in files | own and not item.name.endswith(header.INDEX_SUFFIX)
    ]
    return Identity(path, networks, beside)


def _check_pair(path: Path, high: Network, low: Network) -> None:
    pairs = {
        "network": (layouts.describe(high.config), layouts.describe(low.config)),
        "layout": (LABELS[high.layout], LABELS[low.layout]),
        "attention": (_comparable(high.attention), _comparable(low.attention)),
        "quantization": (high.scheme, low.scheme),
    }
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise CheckpointProblem(
                f"{path}: its experts do not belong together, their {what} differs: high has {ours}, low has {theirs}"
            )


def _comparable(attention: AttentionConfig) -> dict[str, Any]:
    """Without top-k by layer, which each expert has chosen for itself."""
    values = attention.to_dict()
    return {**values, "topk": "by layer", "layer_topk": "by layer"} if attention.layer_topk else values


def identify_network(path: Path) -> Network:
    """One network's files. Raises CheckpointProblem like `identify`."""
    contents = open_contents(path)
    names = list(contents.entries)
    _refuse_others(names, str(path))
    native = layouts.native_entries(contents.entries, str(path))
    shapes = {name: entry.shape for name, entry in native.items()}
    patch = native.get("patch_embedding.weight")
    meta = describe(path, shapes, contents.metadata, contents.config, patch.dtype if patch else None)
    missing, unexpected, wrong = compare(
        shapes, WanConfig.from_dict(meta.config), AttentionConfig.from_dict(meta.attention)
    )
    stripped = sorted({part for name in names for part in _wrappers_of(name)})
    return Network(
        *(path, contents, native, _layout(contents, native), stripped, meta),
        *(missing, unexpected, wrong, _unused(names)),
    )


def describe(
    path: str | Path,
    shapes: Mapping[str, Shape],
    metadata: dict[str, Any] | None,
    config: Mapping[str, Any],
    dtype: str | None,
) -> CheckpointMeta:
    """Our metadata, or what shapes, names and a config.json tell. Raises CheckpointProblem."""
    if metadata is not None:
        return CheckpointMeta.from_dict(metadata, str(path))
    network = layouts.infer_config(shapes, layouts.config_hints(config), str(path))
    scheme = layouts.quantization_scheme(shapes)
    return CheckpointMeta(
        variant=_name_variant(path, network),
        config=network.to_dict(),
        attention=layouts.infer_attention(shapes).to_dict(),
        quantization=None if scheme is None else {"scheme": scheme},
        dtype=dtype or "bfloat16",
    )


def _name_variant(path: str | Path, config: WanConfig) -> str:
    """Wan 2.1 14B and a Wan 2.2 expert have equal tensors: the names of file and folder decide."""
    names = variants_with(config)
    place = " ".join(Path(path).expanduser().absolute().parts[-3:]).lower()
    newer = any(sign in place for sign in ("2.2", "a14b", "high", "low", "noise"))
    return (names[-1] if newer else names[0]) if names else ""


def _refuse_others(names: Iterable[str], source: str) -> None:
    bare = [layouts.strip_wrappers(name) for name in names]
    for pattern, what, remedy in others.OTHERS:
        found = [name for name in bare if re.search(pattern, name)]
        if found:
            raise CheckpointProblem(f"{source}: {what} ({len(found)} tensors like {found[0]}); {remedy}")


def _wrappers_of(name: str) -> list[str]:
    """The parts that `layouts.strip_wrappers` takes off."""
    infixes = [infix for infix in wrappers.INFIXES if infix in name]
    for infix in infixes:
        name = name.replace(infix, "")
    prefix = name[: len(name) - len(layouts.strip_wrappers(name))]
    return infixes + ([prefix] if prefix else [])


def _layout(contents: Contents, native: Mapping[str, Entry]) -> str:
    names = list(contents.entries)
    bare = [layouts.strip_wrappers(name) for name in names]
    kinds = {name.rpartition(".")[2] for name in bare}
    matrix = next((e for n, e in zip(bare, contents.entries.values()) if n == turbodiffusion.FLATTENED), None)
    if any(name.startswith("condition_embedder.") for name in bare):
        return "diffusers"
    if kinds & set(scaled.COMFYUI) or any("diffusion_model." in name for name in names):
        return "comfyui"
    if kinds & set(scaled.SCALES):
        return "lightx2v"
    if any(name.startswith((turbodiffusion.PREFIX, turbodiffusion.EMA_PREFIX)) for name in names):
        return "rcm"
    if matrix is not None and len(matrix.shape) == 2:
        return "turbodiffusion"
    if layouts.quantization_scheme({name: entry.shape for name, entry in native.items()}):
        return "turbotrain"
    # Our metadata also travel in other projects' layouts; official folders have a config.json, ours have none.
    return "turbotrain" if contents.metadata is not None and not contents.config else "official"


def _unused(names: list[str]) -> dict[str, list[str]]:
    """Tensors of the file that reading leaves out, by what they are."""
    left_out = sorted(set(names) - set(layouts.native_names(names)))
    groups: dict[str, list[str]] = {}
    has_average = any(turbodiffusion.EMA_PREFIX in name for name in names)
    for name in left_out:
        kind = name.rpartition(".")[2]
        if kind in scaled.MARKERS:
            continue  # they say what the layout and the scheme say
        if kind in scaled.INPUT_SCALES:
            what = "scales of activations, which are found at run time here"
        elif has_average and turbodiffusion.EMA_PREFIX not in name:
            what = "training weights beside their average (net_ema), which is the one that is sampled"
        else:
            what = "tensors that no network uses"
        groups.setdefault(what, []).append(name)
    return groups


def shorten(names: list[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


# ---- for people ---------------------------------------------------------------------------------------------------------


def summary(identity: Identity) -> dict[str, Any]:
    """What `tools/convert.py --inspect` says, as data."""
    network = identity.first
    config, meta = network.config, network.meta
    # A file of one network may be an expert, but two networks are a two-expert variant.
    experts = len(identity.networks)
    names = [name for name in variants_with(config) if experts == 1 or len(VARIANTS[name].experts) == experts]
    files = [file for part in identity.networks.values() for file in part.contents.files]
    return {
        "path": str(identity.path),
        "layout": network.layout,
        "files": [str(file) for file in files],
        "bytes": sum(entry.nbytes for part in identity.networks.values() for entry in part.contents.entries.values()),
        "stripped": network.stripped,
        "variants": [meta.variant] if meta.variant and network.described else names,
        "config": config.to_dict(),
        "experts": {expert: str(part.path) for expert, part in identity.networks.items() if expert},
        "attention": network.attention.to_dict(),
        "quantization": network.scheme,
        "quantized_layers": sum(name.endswith(turbodiffusion.QUANTIZED_WEIGHTS) for name in network.native),
        "block_linears": len({m.group(0) for name in network.native if (m := BLOCK_LINEAR.match(name))}),
        "dtypes": dict(Counter(entry.dtype for entry in network.contents.entries.values()).most_common()),
        "tensors": len(network.contents.entries),
        "metadata": network.contents.metadata,
        "missing": {expert: part.missing for expert, part in identity.networks.items() if part.missing},
        "unexpected": {expert: part.unexpected for expert, part in identity.networks.items() if part.unexpected},
        "wrong": {expert: part.wrong for expert, part in identity.networks.items() if part.wrong},
        "unused": {what: len(names) for part in identity.networks.values() for what, names in part.unused.items()},
        "beside": identity.beside,
    }


def report(identity: Identity) -> str:
    """The same for the eye."""
    said, network = summary(identity), identity.first
    attention = network.attention
    settings = f"top-k {_topk_of(attention)}, blocks {attention.block_q} x {attention.block_k}, {attention.order} order"
    origin = "" if network.described else "; not in the file: as published"
    sizes = ", ".join(f"{count} {dtype}" for dtype, count in said["dtypes"].items())
    quantized = f"{said['quantization']}, {said['quantized_layers']} of {said['block_linears']} block linears"
    whole = " (older than torch 1.6: read whole)" if network.contents.whole else ""
    lines = {
        "layout": LABELS[network.layout] + (f"; stripped: {', '.join(network.stripped)}" if network.stripped else ""),
        "files": f"{len(said['files'])}, {_size(said['bytes'])}{whole}",
        "variant": " or ".join(said["variants"]) or "none of the published ones",
        "network": layouts.describe(network.config),
        "experts": ", ".join(f"{expert} noise: {path}" for expert, path in said["experts"].items()) or "one network",
        "attention": f"{attention.kind} ({settings}{origin})" if attention.is_sparse else "dense",
        "quantization": quantized if said["quantization"] else "none",
        "dtype": sizes,
        "metadata": "turbotrain's" if network.described else "none",
    }
    for expert, part in identity.networks.items():
        lines[f"complete {expert}".strip()] = part.problems or f"yes, {len(part.contents.entries)} tensors"
        lines.update({f"unused {expert}".strip(): f"{len(names)} {what}" for what, names in part.unused.items()})
    if identity.beside:
        lines["beside"] = f"{shorten(identity.beside)}: left alone"
    width = max(map(len, lines))
    return "\n".join([f"{identity.path}", *(f"  {key:{width}}  {value}" for key, value in lines.items())])


def _topk_of(attention: AttentionConfig) -> str:
    topks = attention.layer_topk
    return f"{attention.topk:.4g} on average, {min(topks)} to {max(topks)} by layer" if topks else str(attention.topk)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
