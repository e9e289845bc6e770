"""A distilled network as a folder that diffusers' Wan pipelines load: networks, VAE, text encoder, tokenizer and TurboScheduler.

diffusers computes dense attention in floating point. What a student has beyond that, SLA and 8-bit layers, is refused unless the
caller gives it up by name.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from turbotrain.checkpoint import targets
from turbotrain.checkpoint.atomic import new_folder
from turbotrain.checkpoint.components import find_component
from turbotrain.checkpoint.convert import convert
from turbotrain.checkpoint.header import CheckpointProblem, read_config
from turbotrain.checkpoint.identify import Identity, Network, identify
from turbotrain.checkpoint.keymaps.targets import TARGETS
from turbotrain.checkpoint.layouts import describe
from turbotrain.checkpoint.meta import CheckpointMeta
from turbotrain.diffusion.samplers import TURBO_TIMES
from turbotrain.diffusion.turbo_scheduler import TurboScheduler
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, Variant, WanConfig

# {part: (library, class)}; the tokenizer's class is its folder's own.
CLASSES = {
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}
_NOTHING = (None, None)


@dataclasses.dataclass
class Export:
    """What was written: the pipeline's class, and what of the student it does not hold (nothing unless that was allowed)."""

    folder: Path
    pipeline: str
    losses: list[str]


def export_pipeline(
    source: str | Path,
    output: str | Path,
    *,
    components: Mapping[str, str] | None = None,
    variant: str | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    lossy: bool = False,
    force: bool = False,
) -> Export:
    """Write the student at `source` (any layout; two experts: the folder above) to `output`, all of it or nothing.

    Args:
        components: vae, text_encoder, tokenizer (image_encoder, image_processor): folders instead of those that metadata name.
        variant: for files whose metadata does not say.
        dtype: of the weights outside the float32 islands; default: as they are.
        dequantize: multiply 8-bit layers out, to `dtype` or what the checkpoint says of its other weights.
        lossy: write an SLA student without its linear branch; its attention will be dense, which it was not trained for.
        force: replace what is at `output`.

    Raises:
        CheckpointProblem: a source that is none, was not distilled, is sparse or quantized without leave; an output that exists.
        ValueError: a part is missing, no folder on this machine, or of another network.
        OSError: writing fails; what was at `output` is then still there.
    """
    identity, output = identify(source), Path(output).expanduser()
    first = identity.first
    for network in identity.networks.values():
        network.require_complete()
    chosen = _variant(identity, variant)
    losses = _what_is_given_up(identity, dequantize, lossy)
    scheduler = turbo_scheduler(first.meta, chosen, str(identity.path), first.described)
    parts = _parts(identity, chosen, components or {})
    target = TARGETS["diffusers"]
    targets.check_output([identity.path, *parts.values()], output, target, len(identity.networks), force)
    if first.scheme is not None and dtype is None:
        dtype = first.meta.dtype
    networks = {expert: _dense(network) for expert, network in identity.networks.items()}
    with new_folder(output) as folder:
        plain = dataclasses.replace(identity, networks=networks)
        losses += convert(plain, folder, "diffusers", dtype=dtype, variant=variant, lossy=bool(losses or dtype)).losses
        for name, place in parts.items():
            shutil.copytree(place, folder / name)
        scheduler.save_pretrained(folder / "scheduler")
        index = model_index(chosen, parts, len(networks))
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return Export(output, index["_class_name"], losses)


def turbo_scheduler(meta: CheckpointMeta, variant: Variant, source: str, described: bool = True) -> TurboScheduler:
    """The scheduler with a checkpoint's sampler settings, or the variant's for files of other projects.

    Raises:
        CheckpointProblem: our metadata say that the network was not distilled.
    """
    if described and meta.sampler is None:
        raise CheckpointProblem(
            f"{source}: its metadata name no Turbo sampler, so it was not distilled: a pipeline of 1 to 4 steps would show "
            "little; tools/convert.py --to diffusers writes a teacher's weights"
        )
    told = meta.sampler or {}
    return TurboScheduler(
        sigma_max=float(told.get("sigma_max", variant.sigma_max)),
        times=[float(time) for time in told.get("times") or TURBO_TIMES],
        ode=bool(told.get("ode", False)),
    )


def model_index(variant: Variant, parts: Mapping[str, Path], experts: int) -> dict[str, Any]:
    """model_index.json: which class diffusers builds from which folder."""
    network = ("diffusers", "WanTransformer3DModel")
    classes: dict[str, tuple[str | None, str | None]] = {
        "scheduler": (TurboScheduler.__module__, TurboScheduler.__name__),
        "transformer": network,
        "transformer_2": network if experts == 2 else _NOTHING,
    }
    for name, place in parts.items():
        classes[name] = ("transformers", _tokenizer_class(place)) if name == "tokenizer" else CLASSES[name]
    is_i2v = variant.config.model_type == "i2v"
    if is_i2v:
        classes = {"image_encoder": _NOTHING, "image_processor": _NOTHING, **classes}
    return {
        "_class_name": "WanImageToVideoPipeline" if is_i2v else "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": variant.boundary,
        "expand_timesteps": variant.config.model_type == "ti2v",
        **{name: list(pair) for name, pair in sorted(classes.items())},
    }


def _variant(identity: Identity, variant: str | None) -> Variant:
    name = variant or identity.first.meta.variant
    if name not in VARIANTS:
        raise CheckpointProblem(f"variant={name!r}: unknown for {identity.path}; say one of {', '.join(VARIANTS)}")
    found = VARIANTS[name]
    if variant is not None and found.config != identity.first.config:
        held, said = describe(identity.first.config), describe(found.config)
        raise CheckpointProblem(f"variant={name!r}: {identity.path} holds {held}, not {said}; leave it out")
    if len(found.experts) != len(identity.networks):
        raise CheckpointProblem(
            f"{identity.path} holds {len(identity.networks)} network(s), but a pipeline of {name} has {len(found.experts)}; "
            "name the folder that holds the high- and the low-noise expert, or the variant that fits"
        )
    return found


def _what_is_given_up(identity: Identity, dequantize: bool, lossy: bool) -> list[str]:
    """What diffusers will not compute as the student was trained. Raises CheckpointProblem where that was not allowed."""
    first = identity.first
    given_up: list[str] = []
    if first.attention.is_sparse:
        said = f"its attention is {first.attention.kind}, which diffusers computes densely, without the linear branch P"
        if not lossy:
            raise CheckpointProblem(
                f"{identity.path}: {said}: other videos than it was trained for, at dense cost; infer.py samples it as it is, "
                "--lossy exports it anyway"
            )
        given_up.append(f"{said}: it was not trained for that")
    if first.scheme is not None and not dequantize:
        raise CheckpointProblem(
            f"{identity.path}: its layers are {first.scheme}, for which diffusers has no 8-bit arithmetic; --dequantize "
            "multiplies them out, or export the checkpoint from before quantization"
        )
    return given_up


def _dense(network: Network) -> Network:
    """The network without the projections of SLA's linear branch."""
    kept = {name: entry for name, entry in network.native.items() if ".proj_l." not in name}
    meta = dataclasses.replace(network.meta, attention=AttentionConfig().to_dict())
    return dataclasses.replace(network, native=kept, meta=meta)


def _parts(identity: Identity, variant: Variant, given: Mapping[str, str]) -> dict[str, Path]:
    """{part: its folder}, checked to be what its place in the pipeline asks for."""
    named = {**identity.first.meta.components, **{name: value for name, value in given.items() if value}}
    needed = ["vae", "text_encoder", "tokenizer"]
    if variant.config.image_dim is not None:
        needed += ["image_encoder", "image_processor"]
    return {name: _part(name, named, identity.path, variant.config) for name in needed}


def _part(name: str, named: Mapping[str, str], source: Path, config: WanConfig) -> Path:
    option = f"--{name.replace('_', '-')} FOLDER"
    place = Path(find_component(name, dict(named), source))
    if not place.is_dir():
        raise ValueError(
            f"{name}={str(place)!r}: no folder here, and a pipeline holds its parts; download it, then say {option}"
        )
    if name not in ("vae", "text_encoder"):
        return place
    said, expected = read_config(place), CLASSES[name][1]
    classes = [said.get("_class_name"), *(said.get("architectures") or [])]
    if expected not in classes:
        raise ValueError(f"{name}={str(place)!r}: holds no {expected}, which diffusers loads here; say {option}")
    field, wanted = ("z_dim", config.out_channels) if name == "vae" else ("d_model", config.text_dim)
    if said.get(field) != wanted:
        raise ValueError(
            f"{name}={str(place)!r}: its {field} is {said.get(field)}, the network's is {wanted}; say {option}"
        )
    return place


def _tokenizer_class(place: Path) -> str:
    """The class that a tokenizer's folder names; transformers 5 calls the general one TokenizersBackend, 4 does not know that."""
    file = place / "tokenizer_config.json"
    named = json.loads(file.read_text()).get("tokenizer_class") if file.is_file() else None
    return named if named and named != "TokenizersBackend" else "PreTrainedTokenizerFast"
