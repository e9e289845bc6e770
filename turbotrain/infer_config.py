"""The schema of `infer.py`: one dataclass, checked against the checkpoint's header before torch is imported.

Every check names the field, the value and what is allowed. What depends on the variant (sizes, lengths, image input) is read from
the checkpoint's metadata, which a header read gives in milliseconds (`turbotrain.checkpoint.header`).
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import re
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from turbotrain.checkpoint import layouts
from turbotrain.checkpoint.components import COMPONENTS, TEXT_DEVICES, TEXT_DTYPES, check_component, find_component
from turbotrain.checkpoint.header import CheckpointProblem, Glimpse, check_checkpoint, inspect_checkpoint
from turbotrain.compose import UsageError, compose, reject
from turbotrain.model.attention_config import KINDS
from turbotrain.model.variants import VARIANTS, Variant, variants_with

MODES = ("generate", "evaluate", "benchmark")
SAMPLINGS = ("turbo", "teacher")
SOLVERS = ("unipc", "euler")
DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("checkpoint", "random")
SCHEMES = ("none", "int8_channel", "int8_block128", "fp8_channel")
OUTPUT_SUFFIXES = (".mp4", ".gif", ".png", ".webp")
# Free text: taken as typed, so that commas and quotes in a prompt need no escaping.
TEXT_FIELDS = ("checkpoint", "prompt", "prompts", "negative_prompt", "image", "output", "teacher", *COMPONENTS)
MAX_TURBO_STEPS = 4
_ROOM_BYTES = 1 << 20


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class InferConfig:
    checkpoint: str = _help("", "checkpoint folder or file; the only thing that must be said besides a prompt")
    prompt: str = _help("", "what the video shows")
    prompts: str = _help("", "text file with one prompt a line, instead of prompt")
    negative_prompt: str | None = _help(None, "teacher sampler; default: the variant's own; no effect in turbo")
    image: str = _help("", "first frame, for i2v and ti2v variants")
    output: str = _help("out.mp4", "file to write; suffix .mp4, .gif, .webp or .png; several videos get numbered names")
    mode: str = _help("generate", "generate | evaluate | benchmark")
    sampling: str = _help("turbo", "turbo (1 to 4 steps, no guidance) | teacher (many steps, guidance)")
    steps: int | None = _help(None, "network evaluations; default 4 (turbo) or the variant's own (teacher)")
    seed: int = _help(0, "video j of a run uses seed + j")
    seeds: list[int] = field(default_factory=list, metadata={"help": "several seeds for every prompt, instead of seed"})
    solver: str = _help("unipc", "teacher sampler: unipc | euler")
    guidance: float | None = _help(None, "teacher sampler: guidance scale; default: the variant's own")
    shift: float | None = _help(None, "teacher sampler: time shift; default: the variant's own")
    ode: bool | None = _help(None, "turbo sampler: sharper and less robust; default: what the checkpoint says")
    sigma_max: float | None = _help(None, "turbo sampler: first noise level; default: what the checkpoint says")
    width: int | None = _help(None, "pixels; default: the variant's own")
    height: int | None = _help(None, "pixels; default: the variant's own")
    frames: int | None = _help(None, "4n + 1; default: the variant's own")
    fps: float | None = _help(None, "frames per second of the file; default: the variant's own")
    batch_size: int = _help(1, "videos sampled together")
    device: str = _help("auto", "auto | cpu | cuda | cuda:N")
    dtype: str = _help("auto", "auto | float32 | bfloat16 | float16")
    attention_kind: str = _help(
        "auto", "auto (what the checkpoint says) | sla | sage_sla (8-bit attention, equal weights)"
    )
    cuda_graphs: bool = _help(True, "record a small network's kernel launches once and replay them; false: less memory")
    variant: str | None = _help(None, "for files of other projects, which do not name it")
    vae: str | None = _help(None, "VAE: folder, official .pth or hub id, where the checkpoint names none")
    text_encoder: str | None = _help(None, "text encoder: folder, official .pth or hub id, likewise")
    tokenizer: str | None = _help(None, "tokenizer: folder or hub id, likewise")
    image_encoder: str | None = _help(None, "CLIP of Wan 2.1 I2V: folder, official .pth or hub id, likewise")
    text_device: str = _help("auto", "auto (the GPU while it encodes, if it fits) | cpu | cuda")
    text_dtype: str = _help("auto", "auto (bfloat16 for Wan) | float32 | bfloat16 | int8 (weights in half the memory)")
    text_cache: bool = _help(True, "generate: keep text embeddings in ~/.cache/turbotrain/text")
    count: int = _help(64, "evaluate: held-out prompts")
    teacher: str = _help("", "evaluate: teacher checkpoint for PSNR and SSIM at equal seeds; empty: none")
    teacher_steps: int | None = _help(None, "evaluate: steps of that teacher; default: the variant's own")
    repeats: int = _help(5, "benchmark: timed repeats, of which the median is reported")
    warmup: int = _help(1, "benchmark: untimed repeats before them")
    weights: str = _help("checkpoint", "benchmark: checkpoint | random (one network step of variant, without files)")
    scheme: str = _help("none", "benchmark weights=random: none | int8_channel | int8_block128 | fp8_channel")
    json: str = _help("", "evaluate, benchmark: also write the result to this JSON file")
    debug: bool = _help(False, "show tracebacks")


@dataclass(frozen=True)
class Request:
    """A checked configuration and what the checks had to read anyway."""

    config: InferConfig
    prompts: list[str]
    glimpse: Glimpse | None  # None: random weights
    variant: Variant | None


def load_request(overrides: list[str]) -> Request:
    """From `key=value` arguments to a checked request.

    Raises:
        UsageError: an argument that cannot be used (exit status 2).
        CheckpointProblem, OSError: files that cannot be used (exit status 1).
    """
    config = compose("infer", [prepare(override) for override in overrides], InferConfig)
    return check(config)


def usage() -> str:
    """The text of `--help`: every key with its default and meaning."""
    lines = ["usage: python infer.py checkpoint=PATH prompt='...' [key=value ...]", ""]
    for item in fields(InferConfig):
        default = item.default_factory() if callable(item.default_factory) else item.default
        shown = "" if default in ("", None, []) else f" [{default}]"
        lines.append(f"  {item.name:<16} {item.metadata['help']}{shown}")
    return "\n".join(lines)


def prepare(override: str) -> str:
    """An argument as Hydra should see it.

    The value of a free-text key is quoted, because Hydra would read commas, brackets and `${` as syntax; one seed becomes a list.
    """
    key, separator, value = override.partition("=")
    if key == "seeds" and value.lstrip("+-").isdigit():
        return f"seeds=[{value}]"
    if not separator or key not in TEXT_FIELDS or value == "" or (value == "null" and key != "prompt"):
        return override
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]  # quoted for Hydra already
    # Backslashes are literal in both grammars, except in front of what they escape: there each of them is doubled.
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    value = re.sub(r"(\\*)'", r"\1\1\\'", value)
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return f"{key}='{value}'"


def check(config: InferConfig) -> Request:
    """Every check that needs no network: choices, ranges, files, the checkpoint's header, the device, room for the output."""
    _choice("mode", config.mode, MODES)
    _choice("sampling", config.sampling, SAMPLINGS)
    _choice("solver", config.solver, SOLVERS)
    _choice("dtype", config.dtype, DTYPES)
    _choice("weights", config.weights, WEIGHTS)
    _choice("text_device", config.text_device, TEXT_DEVICES)
    _choice("text_dtype", config.text_dtype, TEXT_DTYPES)
    _choice("scheme", config.scheme, SCHEMES)
    _choice("attention_kind", config.attention_kind, ("auto", *KINDS))
    _check_numbers(config)
    if config.weights == "random":
        return _check_random(config)
    if config.scheme != "none":
        reject("scheme", config.scheme, "is for weights=random; a checkpoint is quantised by train.py stage=quantize")
    prompts = _read_prompts(config)
    if not config.checkpoint:
        raise UsageError("checkpoint: missing; say checkpoint=PATH, a folder or file that training or conversion wrote")
    if config.variant is not None:
        _choice("variant", config.variant, tuple(VARIANTS))
    glimpse = _look("checkpoint", config.checkpoint, config.variant)
    if config.teacher:
        _look("teacher", config.teacher, None)
    variant = _check_variant(config, glimpse)
    _check_attention(config, glimpse)
    _check_sigma_max(config, glimpse)
    _check_size(config, variant)
    _check_image(config, variant)
    _check_components(config, glimpse, variant)
    _check_device("device", config.device)
    _check_device("text_device", config.text_device)
    _check_output(config)
    return Request(config, prompts, glimpse, variant)


def _check_random(config: InferConfig) -> Request:
    """What weights=random needs: a variant to build, and nothing to read."""
    if config.mode != "benchmark":
        reject("weights", config.weights, f"is for mode=benchmark, and this is mode={config.mode}")
    for name in ("checkpoint", "prompt", "prompts"):
        if getattr(config, name):
            reject(name, getattr(config, name), "weights=random reads nothing; leave it out")
    if config.variant is None:
        raise UsageError(f"variant: missing; weights=random needs one of {', '.join(VARIANTS)}")
    _choice("variant", config.variant, tuple(VARIANTS))
    variant = VARIANTS[config.variant]
    _check_size(config, variant)
    _check_device("device", config.device)
    _check_output(config)
    return Request(config, [], None, variant)


def _check_attention(config: InferConfig, glimpse: Glimpse) -> None:
    if config.attention_kind == "dense":
        reject(
            "attention_kind", config.attention_kind, "is for weights=random; a checkpoint takes auto, sla or sage_sla"
        )
    trained = ((glimpse.metadata or {}).get("attention") or {}).get("kind")
    if config.attention_kind != "auto" and trained == "dense":
        reject("attention_kind", config.attention_kind, "the checkpoint was trained with dense attention; leave it out")


def _check_numbers(config: InferConfig) -> None:
    most = MAX_TURBO_STEPS if config.sampling == "turbo" else 1000
    if config.steps is not None and not 1 <= config.steps <= most:
        hint = "the Turbo sampler takes 1 to 4; sampling=teacher takes more" if most == MAX_TURBO_STEPS else "1 to 1000"
        reject("steps", config.steps, hint)
    if config.teacher_steps is not None and not 1 <= config.teacher_steps <= 1000:
        reject("teacher_steps", config.teacher_steps, "1 to 1000")
    for name, least in (("batch_size", 1), ("count", 2), ("repeats", 1), ("warmup", 0)):
        if getattr(config, name) < least:
            reject(name, getattr(config, name), f"at least {least}")
    for name, values in (("seed", [config.seed]), ("seeds", config.seeds)):
        for value in values:
            if not 0 <= value < 1 << 63:
                reject(name, value, "0 to 2^63 - 1")
    for name in ("shift", "sigma_max", "fps"):
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            reject(name, value, "a number above 0")
    if config.guidance is not None and not (config.guidance >= 0 and math.isfinite(config.guidance)):
        reject("guidance", config.guidance, "a number of at least 0 (1: no guidance)")
    for name in ("width", "height", "frames"):
        value = getattr(config, name)
        if value is not None and value < 1:
            reject(name, value, "at least 1")
    if config.sampling == "turbo":
        for name in ("guidance", "shift"):
            if getattr(config, name) is not None:
                reject(
                    name,
                    getattr(config, name),
                    "is for sampling=teacher; the Turbo sampler has no guidance and its own times",
                )
    else:
        for name in ("ode", "sigma_max"):
            if getattr(config, name) is not None:
                reject(name, getattr(config, name), "is for sampling=turbo")


def _read_prompts(config: InferConfig) -> list[str]:
    if config.mode == "evaluate":
        if config.prompt or config.prompts:
            reject(
                "prompt", config.prompt or config.prompts, "mode=evaluate brings its own held-out prompts; leave it out"
            )
        return []
    if config.prompt and config.prompts:
        reject("prompts", config.prompts, "use prompt or prompts, not both")
    if config.prompts:
        path = Path(config.prompts).expanduser()
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            reject("prompts", config.prompts, f"{reason}; name a text file with one prompt a line")
            raise  # reject always raises: this line tells the type checker so
        prompts = [line for line in lines if line]
        if not prompts:
            reject("prompts", config.prompts, "the file holds no prompt; write one a line")
        return prompts
    if not config.prompt.strip():
        reject("prompt", config.prompt, "empty; say what the video shows, for example prompt='a cat on a boat'")
    return [config.prompt]


def _look(name: str, path: str, variant: str | None) -> Glimpse:
    try:
        return check_checkpoint(path, variant) if variant else inspect_checkpoint(path)
    except CheckpointProblem as problem:
        raise CheckpointProblem(f"{name}: {problem}") from problem


def _check_variant(config: InferConfig, glimpse: Glimpse) -> Variant | None:
    """The variant that metadata, the user or the tensors' shapes name; None for a pickle that nobody named."""
    named = glimpse.metadata.get("variant") if glimpse.metadata else None
    if config.variant is not None and named and named != config.variant:
        reject(
            "variant",
            config.variant,
            f"the checkpoint says it is {named!r}; leave variant out or use that one's checkpoint",
        )
    name = named or config.variant
    if not name and glimpse.shapes and not glimpse.metadata:
        names = layouts.native_names(glimpse.shapes, config.checkpoint)
        shapes = {native: glimpse.shapes[own] for own, native in names.items()}
        fitting = variants_with(layouts.infer_config(shapes, layouts.config_hints(glimpse.config), config.checkpoint))
        name = fitting[0] if fitting else None
    if not name:
        return None
    if name not in VARIANTS:
        raise CheckpointProblem(
            f"checkpoint: {config.checkpoint} is of variant {name!r}, which this version does not know "
            f"(known: {', '.join(VARIANTS)}); update turbotrain"
        )
    return VARIANTS[name]


def _check_sigma_max(config: InferConfig, glimpse: Glimpse) -> None:
    """The first step must be noisier than the second, whose TrigFlow time the checkpoint records."""
    times = ((glimpse.metadata or {}).get("sampler") or {}).get("times")
    if config.sigma_max is not None and times and config.steps != 1 and not config.sigma_max > math.tan(times[0]):
        reject(
            "sigma_max", config.sigma_max, f"must be above {math.tan(times[0]):.4g}, the noise level of the second step"
        )


def _check_size(config: InferConfig, variant: Variant | None) -> None:
    stride_t, stride_h, stride_w = variant.vae_stride if variant else (4, 8, 8)
    patch_t, patch_h, patch_w = variant.config.patch_size if variant else (1, 2, 2)
    unit_t = stride_t * patch_t
    if config.frames is not None and (config.frames - 1) % unit_t:
        below = (config.frames - 1) // unit_t * unit_t + 1
        reject("frames", config.frames, f"must be {unit_t}n + 1, for example {below} or {below + unit_t}")
    for name, unit in (("width", stride_w * patch_w), ("height", stride_h * patch_h)):
        value = getattr(config, name)
        if value is not None and value % unit:
            below = max(unit, value // unit * unit)
            reject(name, value, f"must be divisible by {unit}, for example {below} or {below + unit}")


def _check_image(config: InferConfig, variant: Variant | None) -> None:
    needs = variant is not None and variant.config.model_type == "i2v"
    takes = variant is None or variant.config.model_type in ("i2v", "ti2v")
    if config.image and not takes:
        reject(
            "image",
            config.image,
            f"image input needs an i2v variant; this checkpoint is {variant.name if variant else '?'}",
        )
    if config.image and not Path(config.image).expanduser().is_file():
        reject("image", config.image, "no such file; name an image file")
    if needs and not config.image and config.mode == "generate":
        reject(
            "image", config.image, f"variant {variant.name if variant else '?'} starts from an image: say image=PATH"
        )


def _check_components(config: InferConfig, glimpse: Glimpse, variant: Variant | None) -> None:
    """That every part is somewhere, and that files among them are whole and safe."""
    given = {name: value for name in COMPONENTS if (value := getattr(config, name)) is not None}
    parts = {**((glimpse.metadata or {}).get("components") or {}), **given}
    reads_clip = variant is not None and variant.config.image_dim is not None
    if config.image_encoder is not None and variant is not None and not reads_clip:
        reject("image_encoder", config.image_encoder, f"variant {variant.name} reads no CLIP tokens; leave it out")
    for name in COMPONENTS if reads_clip else COMPONENTS[:3]:
        check_component(name, find_component(name, parts, Path(config.checkpoint).expanduser()))


def _check_device(name: str, device: str) -> None:
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        reject(name, device, "choose auto, cpu, cuda or cuda:N")
    if kind != "cuda":
        return
    count = _cuda_devices()
    if count == 0:
        reject(name, device, f"this machine shows no CUDA device; use {name}=cpu or {name}=auto")
    if count is not None and index and int(index) >= count:
        reject(name, device, f"this machine shows {count} CUDA device(s); use cuda:0 to cuda:{count - 1}")


def _cuda_devices() -> int | None:
    """How many CUDA devices the driver shows; None where only torch can tell (AMD's driver)."""
    if os.path.exists("/dev/kfd"):
        return None
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
        return 0
    return 0


def _check_output(config: InferConfig) -> None:
    targets = {"output": config.output} if config.mode == "generate" else {"json": config.json}
    for name, value in targets.items():
        if name == "output" and Path(value).suffix.lower() not in OUTPUT_SUFFIXES:
            reject(name, value, f"the suffix says the format; use one of {', '.join(OUTPUT_SUFFIXES)}")
        if value:
            probe_writable(name, Path(value).expanduser())


def probe_writable(name: str, target: Path) -> None:
    """Writes and deletes a small file where `target` will go, without creating folders.

    Raises:
        OSError: read-only, no permission, full: found out before minutes of sampling, not after.
    """
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        if target.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not folder.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{name}={str(target)!r}: cannot write in {folder}: {reason}; choose another {name}"
        raise OSError(error.errno or 0, message) from error


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        reject(name, value, f"choose one of {', '.join(allowed)}")
