"""Chooses how a run is placed on a GPU: the fastest way that fits, with a reason for everything that is not the plain way; or
says what does not fit, and what would. No torch here: it is done before anything heavy is imported."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from turbotrain.model.variants import VARIANTS
from turbotrain.placement import footprint
from turbotrain.placement.budget import CONTEXT, RING, Job, Phase, Setting, host_bytes, peak, phases, swapped_blocks
from turbotrain.placement.durations import Durations, durations
from turbotrain.placement.gpus import GPUS, MEASURED, Gpu

SLACK = 0.04  # of the memory: what an allocator cannot use between the pieces in use
FFN_ROWS = 8192  # enough of them for full speed
Options = Mapping[str, Sequence[Any]]
# Fields of a setting, each from the plain way to the one that takes least.
CHOICES: Options = {
    "offload": ("none", "model", "blocks"),
    "text": ("stay", "visit", "stream", "cpu"),
    "vae_chunk": (2, 1),
    "vae_tile": (None, 512, 256),
    "ffn_rows": (None, FFN_ROWS),
    "graphs": (True, False),
}
PLAIN = {
    "offload": "everything on the GPU throughout",
    "text": "a text encoder that stays there",
    "vae_chunk": "decoding more latent frames at once",
    "vae_tile": "decoding whole frames",
    "ffn_rows": "a feed-forward of all tokens at once",
    "graphs": "recording the network as a CUDA graph",
}
SMALLER = ((720, 1280), (480, 832), (320, 576))  # sizes and lengths that a refusal tries
FEWER = (81, 49, 33, 17)


class DoesNotFit(ValueError):
    """No setting fits. The message says the smallest one's need, and what would fit."""


@dataclass(frozen=True)
class Plan:
    """A setting that fits, and what is predicted of it.

    Attributes:
        available: bytes that torch may allocate.
        reasons: one line for every part that is not placed the plain way.
        is_limited: whether less memory may be used than there is.
    """

    job: Job
    setting: Setting
    gpu: Gpu
    available: float
    reasons: tuple[str, ...]
    is_limited: bool = False

    @property
    def peak(self) -> int:
        """Bytes that torch allocates at the largest moment."""
        return peak(self.job, self.setting)

    @property
    def phases(self) -> dict[str, Phase]:
        return phases(self.job, self.setting)

    @property
    def durations(self) -> Durations:
        return durations(self.job, self.setting, self.gpu)

    @property
    def host(self) -> int:
        """Bytes of page-locked host memory."""
        return host_bytes(self.job, self.setting)

    def to_dict(self) -> dict[str, Any]:
        """Everything that a record of a run should hold."""
        return {
            "gpu": self.gpu.name,
            "weights": self.job.scheme or "bfloat16",
            "attention": self.job.attention.kind,
            "setting": asdict(self.setting),
            "reasons": list(self.reasons),
            "peak_bytes": self.peak,
            "available_bytes": round(self.available),
            "host_bytes": self.host,
            "phases": {name: asdict(phase) for name, phase in self.phases.items()},
            "seconds": {**asdict(self.durations), "total": self.durations.total},
        }

    def summary(self) -> str:
        """One line: what is done, what it takes, how long."""
        room = f"{gigabytes(self.peak)} of {gigabytes(self.available)}"
        return f"placement: {describe(self.setting)}; {room}, about {seconds(self.durations.total)} a batch"


def available_of(memory: float) -> float:
    """Bytes that torch may allocate on a GPU of so much memory that nobody else uses."""
    return usable(memory - CONTEXT)


def usable(free: float) -> float:
    """Bytes that torch may allocate of what is free beside CUDA's own."""
    return free * (1 - SLACK)


def memory_for(available: float) -> str:
    """What infer.py's `memory` must be for so many bytes: the inverse of `available_of`, rounded down."""
    return f"{math.floor((available / (1 - SLACK) + CONTEXT) / 1e8) / 10:.1f}GB"


def choose(
    job: Job,
    available: float,
    gpu: Gpu = MEASURED,
    *,
    limits: Options | None = None,
    host_memory: float | None = None,
) -> Plan:
    """The fastest setting that needs at most `available` bytes on the GPU and `host_memory` on the host.

    Tiles change the frames a little where they meet, so they are taken only where nothing else fits.

    Args:
        limits: for fields of Setting, the values among which to choose.

    Raises:
        DoesNotFit: names the smallest need, and what would fit.
    """
    options = {**CHOICES, **(limits or {})}
    fitting = list(_fitting(job, options, available, host_memory))
    if not fitting:
        raise DoesNotFit(_refusal(job, available, options, host_memory))

    def order(setting: Setting) -> tuple[bool, float, list[int]]:
        plainness = [list(values).index(getattr(setting, name)) for name, values in options.items()]
        return setting.vae_tile is not None, round(durations(job, setting, gpu).total, 3), plainness

    best = min(fitting, key=order)
    return Plan(job, best, gpu, available, tuple(_reasons(job, best, available, options)))


def smallest(job: Job, options: Options = CHOICES) -> Setting:
    """What needs least."""
    return min(_settings(job, options, 0.0), key=lambda setting: peak(job, setting))


def describe(setting: Setting) -> str:
    """The setting in the words of infer.py's keys."""
    parts = {
        "offload": setting.offload,
        "kept_blocks": setting.kept_blocks if setting.offload == "blocks" else None,
        "text_device": setting.text,
        "vae_tiling": setting.vae_tile or "none",
        "ffn_rows": setting.ffn_rows,
        "cuda_graphs": None if setting.graphs else "false",
    }
    return " ".join(f"{name}={value}" for name, value in parts.items() if value is not None)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def _fitting(job: Job, options: Options, available: float, host_memory: float | None) -> Iterator[Setting]:
    for setting in _settings(job, options, available):
        if peak(job, setting) <= available and (host_memory is None or host_bytes(job, setting) <= host_memory):
            yield setting


def _settings(job: Job, options: Options, available: float) -> Iterator[Setting]:
    for values in itertools.product(*options.values()):
        setting = Setting(**dict(zip(options, values)))
        kept = _most_kept(job, setting, available) if setting.offload == "blocks" else 0
        yield replace(setting, kept_blocks=kept)


def _most_kept(job: Job, setting: Setting, available: float) -> int:
    """How many blocks stay: as many as there is room for, and never so many that none would have to go."""
    block = footprint.block_bytes(job.variant.config, job.attention, job.scheme)
    spare = available - phases(job, setting)["dit"].total
    return max(0, min(job.variant.config.num_layers - RING - 1, int(spare // block)))


def _reasons(job: Job, setting: Setting, available: float, options: Options) -> Iterator[str]:
    """Each choice that is not the plain one, with what the plain one would have taken."""
    for name, values in CHOICES.items():
        chosen = getattr(setting, name)
        if chosen == values[0]:
            continue
        if values[0] not in options[name]:
            yield f"{name}={chosen}: as asked"
        elif chosen == "blocks":
            needs = peak(job, replace(setting, offload="model"))
            layers, copied = job.variant.config.num_layers, swapped_blocks(job, setting)
            yield f"offload=blocks: a network as a whole takes {gigabytes(needs)}; {layers - copied} of {layers} blocks stay"
        else:
            needs = peak(job, replace(setting, **{name: values[0]}))
            why = f"takes {gigabytes(needs)}" if needs > available else "is no faster"
            yield f"{name}={chosen}: {PLAIN[name]} {why}"


def _refusal(job: Job, available: float, options: Options, host_memory: float | None) -> str:
    least = smallest(job, options)
    needs = peak(job, least)
    message = f"{job.variant.name} at {job.width}x{job.height}, {job.frames} frames, needs at least "
    if needs <= available and host_memory is not None:
        message += f"{gigabytes(host_bytes(job, least))} of host memory, {gigabytes(host_memory)} are free"
    else:
        largest = max(phases(job, least).items(), key=lambda item: item[1].total)[0]
        message += f"{gigabytes(needs)} of GPU memory (in phase {largest}), {gigabytes(available)} may be used"
    would = list(_remedies(job, available, options, host_memory))
    return f"{message}; what would fit: {'; '.join(would)}" if would else message


def _remedies(job: Job, available: float, options: Options, host_memory: float | None) -> Iterator[str]:
    """What would fit instead."""

    def fits(other: Job, options: Options = options) -> bool:
        return next(_fitting(other, options, available, host_memory), None) is not None

    if fits(job, CHOICES):
        asked = [f"{name}={values[0]}" for name, values in options.items() if values != CHOICES[name]]
        yield f"auto instead of {' '.join(asked)}"
        return
    if job.batch > 1 and fits(replace(job, batch=1)):
        yield "batch_size=1"
    if job.scheme is None and fits(replace(job, scheme="int8_channel")):
        yield "8-bit weights (train.py stages=[quantize])"
    shorter = (other for other in _shorter(job) if fits(other))
    yield from (f"{other.width}x{other.height}, {other.frames} frames" for other in itertools.islice(shorter, 1))
    config = job.variant.config
    for other in VARIANTS.values():
        is_smaller = other.config.dim < config.dim and other.vae == job.variant.vae
        if is_smaller and other.config.model_type == config.model_type and fits(replace(job, variant=other)):
            yield other.name
    needed = peak(job, smallest(job, options))
    large = [gpu for gpu in GPUS.values() if available_of(gpu.memory) >= needed > available]
    if large:
        gpu = min(large, key=lambda gpu: gpu.memory)
        yield f"a GPU like {gpu.name}, {gpu.memory / 2**30:.0f} GiB"


def _shorter(job: Job) -> Iterator[Job]:
    """Smaller frames first, then fewer of them."""
    unit_h, unit_w = job.variant.size_multiple
    stride = job.variant.vae_stride[0]
    sizes = [(job.height, job.width), *(size if job.width > job.height else size[::-1] for size in SMALLER)]
    for frames in (job.frames, *(frames for frames in FEWER if frames < job.frames)):
        for height, width in sizes:
            smaller = replace(
                job,
                frames=(frames - 1) // stride * stride + 1,
                height=height // unit_h * unit_h,
                width=width // unit_w * unit_w,
            )
            if smaller.height * smaller.width <= job.height * job.width and smaller != job:
                yield smaller
