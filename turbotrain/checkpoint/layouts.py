"""Names and dimensions of every checkpoint layout, read from keys and shapes alone. No torch here.

The tables are data (keymaps/); this module applies them in both directions.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from turbotrain.checkpoint.header import CheckpointProblem, refuse_unreadable_format
from turbotrain.checkpoint.keymaps import diffusers, official, scaled, turbodiffusion, wrappers
from turbotrain.checkpoint.stream import Entry
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, WanConfig, variants_with

LAYOUTS = ("official", "diffusers", "turbodiffusion")
HEAD_DIM = 128  # of every published network
# SLA files say nothing about their blocks; the published inference code uses these (formats.md 4).
PUBLISHED_SLA = AttentionConfig(kind="sla", topk=0.1, block_q=128, block_k=64)
HEAD_PROJECTION = "self_attn.attn_op.local_attn.proj_l"  # P of SLA's linear branch, in a block
_NUMBER = re.compile(r"blocks\.(\d+)\.")
_DIFFUSERS_TO_NATIVE = {theirs: ours for ours, theirs in diffusers.NATIVE_TO_DIFFUSERS.items()}
_OFFICIAL = {name: name for name in official.MODULES}
_OFFICIAL_ONLY = {name: "" for name in official.MODULES if name not in _DIFFUSERS_TO_NATIVE}


def strip_wrappers(name: str) -> str:
    """`name` without what wrappers, trainers and packagers put around it."""
    for infix in wrappers.INFIXES:
        name = name.replace(infix, "")
    stripped = True
    while stripped:
        stripped = False
        for prefix in (*wrappers.PREFIXES, turbodiffusion.EMA_PREFIX, turbodiffusion.PREFIX):
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    return name


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with its module (the longest one that `table` knows) renamed; None when it knows none."""
    number = _NUMBER.search(name)
    parts = (_NUMBER.sub("blocks.{n}.", name, count=1) if number else name).split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module in table:
            renamed = ".".join([table[module], *parts[length:]])
            return renamed.replace("{n}", number.group(1)) if number else renamed
    return None


def native_name(name: str) -> str | None:
    """The native name of a single tensor that has the name of either family of layouts; None when neither knows its module."""
    stripped = strip_wrappers(name)
    return _translate(stripped, _DIFFUSERS_TO_NATIVE) or _translate(stripped, _OFFICIAL)


def native_names(names: Iterable[str], source: str = "checkpoint") -> dict[str, str]:
    """{name in the file: native name} for every tensor that a network uses.

    Names that no table knows map to themselves without their wrappers: strict loading then lists them.
    Raises CheckpointProblem when two names mean the same parameter.
    """
    names = list(names)
    if any(turbodiffusion.EMA_PREFIX in name for name in names):
        names = [name for name in names if turbodiffusion.EMA_PREFIX in name]
    bare = {name: strip_wrappers(name) for name in names}
    is_diffusers = any(name.startswith("condition_embedder.") for name in bare.values())
    if is_diffusers:
        mixed = [name for name, stripped in bare.items() if _translate(stripped, _OFFICIAL_ONLY) is not None]
        if mixed:
            raise CheckpointProblem(
                f"{source}: mixes diffusers' names with official ones, such as {mixed[0]}; separate them"
            )
    found: dict[str, str] = {}
    for name, stripped in bare.items():
        if name.rpartition(".")[2] in scaled.IGNORED:
            continue
        if is_diffusers:
            if _translate(stripped, dict.fromkeys(diffusers.IGNORED, "")) is not None:
                continue
            found[name] = _translate(stripped, _DIFFUSERS_TO_NATIVE) or stripped
        else:
            found[name] = stripped
    seen: dict[str, str] = {}
    for name, native in found.items():
        if native in seen:
            raise CheckpointProblem(f"{source}: {seen[native]} and {name} both mean {native}; keep one of them")
        seen[native] = name
    return found


def from_layout(state: Mapping[str, Any], source: str = "checkpoint") -> dict[str, Any]:
    """A state dict in any known layout, under native names and with a 5-D patch embedding."""
    entries = native_entries({name: Entry.of(tensor) for name, tensor in state.items()}, source)
    return {name: entry.read() for name, entry in entries.items()}


def native_entries(entries: Mapping[str, Entry], source: str = "checkpoint") -> dict[str, Entry]:
    """Tensors in any known layout, none of them read, under native names and with a 5-D patch embedding.

    8-bit layers get our names (`X.int8_weight` or `X.fp8_weight`, `X.scale`). Raises CheckpointProblem.
    """
    native = {ours: entries[name] for name, ours in native_names(entries, source).items()}
    for name, entry in entries.items():
        if name.endswith(f".{scaled.FORMAT_MARKER}"):
            said = bytes(entry.read().tolist()).decode(errors="replace")
            with contextlib.suppress(ValueError):
                said = json.loads(said)
            refuse_unreadable_format(strip_wrappers(name).rpartition(".")[0], said, source)
    weight = native.get(turbodiffusion.FLATTENED)
    if weight is not None and len(weight.shape) == 2:
        native[turbodiffusion.FLATTENED] = weight.reshape(unflattened(weight.shape))
    return _name_scaled(native, source)


def _name_scaled(native: dict[str, Entry], source: str) -> dict[str, Entry]:
    """8-bit weights of other projects under our names: one scale per row inside blocks, plain weights outside them."""
    for name in [name for name in native if name.endswith(scaled.SCALES)]:
        layer = name.rpartition(".")[0]
        scale, weight = native.pop(name), native.pop(f"{layer}.weight", None)
        dtype = "missing" if weight is None else weight.dtype
        if weight is None or dtype not in scaled.WEIGHTS or math.prod(scale.shape) not in (1, weight.shape[0]):
            raise CheckpointProblem(
                f"{source}: {layer} is {dtype} with a scale of shape {scale.shape}; only int8 and float8_e4m3fn with "
                "one scale per tensor or per output channel are read: export the file in one of these, or in bf16"
            )
        per_row = _scale_per_row(scale, weight.shape[0])
        if layer.startswith("blocks."):
            native[f"{layer}.{scaled.WEIGHTS[dtype]}"], native[f"{layer}.scale"] = weight, per_row
        else:
            native[f"{layer}.weight"] = _scaled_weight(weight, per_row)
    return native


def _scale_per_row(scale: Entry, rows: int) -> Entry:
    return Entry((rows,), "float32", lambda: scale.read().float().reshape(-1).expand(rows).contiguous())


def _scaled_weight(weight: Entry, scale_N: Entry) -> Entry:
    return Entry(weight.shape, "float32", lambda: weight.read().float() * scale_N.read()[:, None])


def to_layout(state: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """A native state dict under the names (and patch embedding) of `layout`. Raises ValueError for what it cannot name."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: choose one of {', '.join(LAYOUTS)}")
    table = diffusers.NATIVE_TO_DIFFUSERS if layout == "diffusers" else _OFFICIAL
    renamed: dict[str, Any] = {}
    for name, value in state.items():
        theirs = _translate(name, table)
        if theirs is None:
            raise ValueError(f"layout={layout!r} has no name for {name}")
        flatten = layout == "turbodiffusion" and name == turbodiffusion.FLATTENED
        if flatten and tuple(value.shape[2:]) != turbodiffusion.PATCH_SIZE:
            raise ValueError(
                f"layout='turbodiffusion' keeps patches of {turbodiffusion.PATCH_SIZE} only, this network's are "
                f"{tuple(value.shape[2:])}: choose official or diffusers"
            )
        renamed[theirs] = value.reshape((value.shape[0], math.prod(value.shape[1:]))) if flatten else value
    return renamed


def unflattened(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The Conv3d shape of a patch embedding saved as a matrix [dim, in * patch]."""
    patch = turbodiffusion.PATCH_SIZE
    return (shape[0], shape[1] // math.prod(patch), *patch)


def quantization_scheme(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The scheme of the 8-bit layers: the weight's name gives the type, the rank of its scale the granularity."""
    for name in shapes:
        layer, _, kind = name.rpartition(".")
        if kind in turbodiffusion.QUANTIZED_WEIGHTS:
            tiled = kind == "int8_weight" and len(shapes.get(f"{layer}.scale", ())) == 2
            return "int8_block128" if tiled else f"{kind.removesuffix('_weight')}_channel"
    return None


def infer_config(shapes: Mapping[str, tuple[int, ...]], hints: Mapping[str, Any], source: str) -> WanConfig:
    """Dimensions of the network whose native tensors have these shapes.

    hints: what shapes cannot tell, from metadata or a config.json: num_heads, eps, text_len. Without them: heads of 128,
    or those of the named variant with the same dimensions.
    Raises CheckpointProblem when tensors that every Wan network has are missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            some = ", ".join(list(shapes)[:4]) or "none"
            raise CheckpointProblem(
                f"{source}: not a Wan transformer, it has no tensor {name} (its tensors begin: {some})"
            )
        return shapes[name]

    patch = shape("patch_embedding.weight")
    patch = unflattened(patch) if len(patch) == 2 else patch
    dim, in_channels, *patch_size = patch
    blocks = {int(match.group(1)) for name in shapes if (match := _NUMBER.match(name))}
    ffn = [f"blocks.0.ffn.0.{kind}" for kind in ("weight", *turbodiffusion.QUANTIZED_WEIGHTS)]
    out_channels = shape("head.head.weight")[0] // math.prod(patch_size)
    image_dim = shapes["img_emb.proj.0.weight"][0] if "img_emb.proj.0.weight" in shapes else None
    values: dict[str, Any] = {
        "dim": dim,
        "ffn_dim": shape(next((name for name in ffn if name in shapes), ffn[0]))[0],
        "num_layers": max(blocks) + 1,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": shape("text_embedding.0.weight")[1],
        "freq_dim": shape("time_embedding.0.weight")[1],
        "patch_size": tuple(patch_size),
        "image_dim": image_dim,
    }
    known = {key: hints[key] for key in ("num_heads", "eps", "text_len") if hints.get(key) is not None}
    for variant in VARIANTS.values():
        candidate = variant.config.to_dict()
        heads_agree = known.get("num_heads", candidate["num_heads"]) == candidate["num_heads"]
        if heads_agree and all(candidate[key] == _plain(value) for key, value in values.items()):
            return WanConfig.from_dict({**candidate, **known})
    if "num_heads" not in known and dim % HEAD_DIM:
        raise CheckpointProblem(
            f"{source}: width {dim} is not a multiple of {HEAD_DIM}, so the number of heads cannot be told from the tensors; "
            'put a config.json with "num_attention_heads" beside it'
        )
    if image_dim is not None or in_channels != out_channels:
        values["model_type"] = "i2v"
    elif out_channels == VARIANTS["wan2.2_ti2v_5b"].config.out_channels:
        values["model_type"] = "ti2v"
    return WanConfig(**{"num_heads": max(1, dim // HEAD_DIM), **values, **known})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def infer_attention(names: Iterable[str]) -> AttentionConfig:
    """Files without metadata: the published SLA blocks when there is a projection P, else dense."""
    return PUBLISHED_SLA if any(".proj_l." in name for name in names) else AttentionConfig()


def describe(config: WanConfig) -> str:
    """`wan2.1_t2v_1.3b (dim 1536, ...)`: what an error message says about a network."""
    names = " or ".join(variants_with(config)) or "an unnamed network"
    clip = f", CLIP tokens of {config.image_dim}" if config.image_dim else ""
    return (
        f"{names} (dim {config.dim}, ffn {config.ffn_dim}, {config.num_heads} heads, {config.num_layers} layers, "
        f"{config.in_channels} -> {config.out_channels} channels, text {config.text_dim}{clip})"
    )


def config_hints(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an official or diffusers config.json says that shapes cannot tell."""
    heads = config.get("num_attention_heads", config.get("num_heads"))
    return {"num_heads": heads, "eps": config.get("eps"), "text_len": config.get("text_len")}
