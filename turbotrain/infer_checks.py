"""Every check of an `infer.py` command line that needs no network, before torch is imported.

Every check names the field, the value and what is allowed. What depends on the variant (sizes, lengths, image input) is read from
the checkpoint's metadata, which a header read gives in milliseconds (`turbotrain.checkpoint.header`).
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from turbotrain.checkpoint import layouts
from turbotrain.checkpoint.components import COMPONENTS, TEXT_DEVICES, TEXT_DTYPES, check_component, find_component
from turbotrain.checkpoint.header import CheckpointProblem, Glimpse, check_checkpoint, inspect_checkpoint
from turbotrain.compose import UsageError, compose, reject
from turbotrain.infer_config import (
    DTYPES,
    MODES,
    OFFLOADS,
    OUTPUT_SUFFIXES,
    SAMPLINGS,
    SCHEMES,
    SCOPES,
    SOLVERS,
    WEIGHTS,
    InferConfig,
    Request,
    prepare,
)
from turbotrain.infer_plan import memory_bytes, tile_pixels
from turbotrain.model.attention_config import KINDS
from turbotrain.model.variants import VARIANTS, Variant, variants_with
from turbotrain.sizes import ADAPTIVE, check_names, video_size

MAX_TURBO_STEPS = 4
_ROOM_BYTES = 1 << 20


def load_request(overrides: list[str]) -> Request:
    """From `key=value` arguments to a checked request.

    Raises:
        UsageError: an argument that cannot be used (exit status 2).
        CheckpointProblem, OSError: files that cannot be used (exit status 1).
    """
    config = compose("infer", [prepare(override) for override in overrides], InferConfig)
    return check(config)


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
    _choice("scope", config.scope, SCOPES)
    _choice("offload", config.offload, OFFLOADS)
    memory_bytes(config.memory)
    tile_pixels(config.vae_tiling)
    _choice("attention_kind", config.attention_kind, ("auto", *KINDS))
    _check_numbers(config)
    if config.weights == "random":
        return _check_random(config)
    if config.scheme != "auto":
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
    if config.text_device == "cuda":
        _check_device("text_device", config.text_device)
    request = Request(config, prompts, glimpse, variant)
    _check_output(request)
    return request


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
    if config.scope == "video" and config.batch_size != 1:
        reject("batch_size", config.batch_size, "a video is timed alone: leave it out, or say scope=network")
    _check_size(config, variant)
    _check_device("device", config.device)
    if config.text_device == "cuda":
        _check_device("text_device", config.text_device)
    request = Request(config, [], None, variant)
    _check_output(request)
    return request


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
            with path.open(encoding="utf-8-sig") as file:
                lines = [line.strip() for line in file]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            reject("prompts", config.prompts, f"{reason}; name a text file with one prompt a line")
            raise  # reject always raises: this line tells the type checker so
        prompts = [line for line in lines if _is_visible(line)]
        if not prompts:
            reject("prompts", config.prompts, "the file holds no prompt; write one a line")
        return prompts
    if not _is_visible(config.prompt):
        reject("prompt", config.prompt, "empty; say what the video shows, for example prompt='a cat on a boat'")
    return [config.prompt]


def _is_visible(text: str) -> bool:
    """Whether anything is left once white space and control characters (null bytes among them) are taken away."""
    return any(character.isprintable() and not character.isspace() for character in text)


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
    if variant is None:
        return
    is_adaptive = config.image and config.aspect in (None, ADAPTIVE) and config.width is None and config.height is None
    height, width = variant.height, variant.width
    try:
        check_names(variant, config.resolution, config.aspect)
        if not is_adaptive:  # else the image is to be read first
            height, width = video_size(variant, config.resolution, config.aspect, config.height, config.width)
        variant.latent_shape(config.frames or variant.frames, height, width)
    except ValueError as error:
        raise UsageError(str(error)) from error


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
    if needs and not config.image and config.mode != "evaluate":
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


def _check_output(request: Request) -> None:
    config = request.config
    if config.mode != "generate":
        if config.previews:
            reject("previews", config.previews, f"is for mode=generate, and this is mode={config.mode}")
        if config.json:
            probe_writable("json", Path(config.json).expanduser())
        return
    if Path(config.output).suffix.lower() not in OUTPUT_SUFFIXES:
        reject("output", config.output, f"the suffix says the format; use one of {', '.join(OUTPUT_SUFFIXES)}")
    targets = request.targets
    probe_writable("output", targets[0])
    for target in targets[1:]:
        _probe_name("output", target)
    if config.previews:
        folder = Path(config.previews).expanduser()
        if folder.exists() and not folder.is_dir():
            reject("previews", config.previews, "is a file; name a folder")
        probe_writable("previews", folder / targets[0].name)


def probe_writable(name: str, target: Path) -> None:
    """Writes and deletes a small file where `target` will go, without creating folders.

    Raises:
        OSError: read-only, no permission, full: found out before minutes of sampling, not after.
    """
    _probe_name(name, target)
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        if not folder.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(name, target, folder, error) from error


def _probe_name(name: str, target: Path) -> None:
    """Raises OSError where a file of this name cannot be, or is one that must not be replaced."""
    try:
        if target.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.lstat()  # a name that is too long
        if not os.access(target, os.W_OK):
            raise OSError(errno.EACCES, "the file there is read-only")
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(name, target, target.parent, error) from error


def _unwritable(name: str, target: Path, folder: Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    message = f"{name}={str(target)!r}: cannot write in {folder}: {reason}; choose another {name}"
    return OSError(error.errno or 0, message)


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        reject(name, value, f"choose one of {', '.join(allowed)}")
