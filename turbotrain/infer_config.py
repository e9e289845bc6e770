"""The schema of `infer.py`: one dataclass, and what a command line becomes once it is checked (`turbotrain.infer_checks`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from turbotrain.checkpoint.components import COMPONENTS
from turbotrain.checkpoint.header import Glimpse
from turbotrain.model.variants import Variant

MODES = ("generate", "evaluate", "benchmark")
SAMPLINGS = ("turbo", "teacher")
SOLVERS = ("unipc", "euler")
DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("checkpoint", "random")
SCOPES = ("video", "network")
SCHEMES = ("auto", "none", "int8_channel", "int8_block128", "fp8_channel")
OFFLOADS = ("auto", "none", "model", "blocks")
OUTPUT_SUFFIXES = (".mp4", ".gif", ".png", ".webp")
# Free text: taken as typed, so that commas and quotes in a prompt need no escaping.
TEXT_FIELDS = (
    "checkpoint",
    "prompt",
    "prompts",
    "negative_prompt",
    "image",
    "aspect",
    "output",
    "previews",
    "teacher",
    *COMPONENTS,
)


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class InferConfig:
    checkpoint: str = _help("", "checkpoint folder or file; the only thing that must be said besides a prompt")
    prompt: str = _help("", "what the video shows")
    prompts: str = _help("", "text file with one prompt a line, instead of prompt")
    negative_prompt: str | None = _help(None, "teacher sampler; default: the variant's own; no effect in turbo")
    image: str = _help("", "first frame, for i2v and ti2v variants; any format, turned as EXIF says, laid on white")
    output: str = _help(
        "out.mp4", "file to write or replace: .mp4, .gif, .webp or .png; several videos get numbered names"
    )
    previews: str = _help("", "generate: folder for what each step but the last would give (a VAE decoding a step)")
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
    resolution: str | None = _help(None, "480p | 580p | 720p; default: the variant's own")
    aspect: str | None = _help(None, "W:H | adaptive (the image's own, which is the default where there is an image)")
    width: int | None = _help(None, "pixels, instead of resolution and aspect")
    height: int | None = _help(None, "pixels, likewise")
    frames: int | None = _help(None, "4n + 1; default: the variant's own")
    fps: float | None = _help(None, "frames per second of the file; default: the variant's own")
    batch_size: int = _help(1, "videos sampled together")
    device: str = _help("auto", "auto | cpu | cuda | cuda:N")
    dtype: str = _help("auto", "auto | float32 | bfloat16 | float16")
    attention_kind: str = _help(
        "auto", "auto (what the checkpoint says) | sla | sage_sla (8-bit attention, equal weights)"
    )
    cuda_graphs: bool = _help(True, "record a small network's kernel launches once and replay them; false: less memory")
    variant: str | None = _help(None, "for files of other projects, which do not name it; model=NAME says the same")
    vae: str | None = _help(None, "VAE: folder, official .pth or hub id, where the checkpoint names none")
    text_encoder: str | None = _help(None, "text encoder: folder, official .pth or hub id, likewise")
    tokenizer: str | None = _help(None, "tokenizer: folder or hub id, likewise")
    image_encoder: str | None = _help(None, "CLIP of Wan 2.1 I2V: folder, official .pth or hub id, likewise")
    offload: str = _help(
        "auto",
        "auto (as planned) | none | model (only what computes is on the GPU) | blocks (and only some of a network)",
    )
    vae_tiling: str = _help("auto", "auto (whole frames if they fit) | none | pixels of a tile's side, such as 512")
    memory: str = _help("auto", "auto (what is free on the GPU) | the most to use of it, such as 12GB")
    text_device: str = _help(
        "auto",
        "auto (as planned) | stay | visit (while it encodes) | stream (layer by layer) | cpu | cuda (stay or visit)",
    )
    text_dtype: str = _help("auto", "auto (bfloat16 for Wan) | float32 | bfloat16 | int8 (weights in half the memory)")
    text_cache: bool = _help(True, "generate: keep text embeddings in ~/.cache/turbotrain/text")
    count: int = _help(64, "evaluate: held-out prompts")
    teacher: str = _help("", "evaluate: teacher checkpoint for PSNR and SSIM at equal seeds; empty: none")
    teacher_steps: int | None = _help(None, "evaluate: steps of that teacher; default: the variant's own")
    repeats: int = _help(5, "benchmark: timed repeats, of which the median is reported")
    warmup: int = _help(1, "benchmark: untimed repeats before them")
    weights: str = _help("checkpoint", "benchmark: checkpoint | random (of variant's true sizes, without files)")
    scope: str = _help(
        "video", "benchmark weights=random: video (prompt to mp4, and a step beside teachers) | network (a step)"
    )
    scheme: str = _help(
        "auto", "benchmark weights=random: auto (int8_channel) | none | int8_channel | int8_block128 | fp8_channel"
    )
    json: str = _help("", "evaluate, benchmark: also write the result to this JSON file")
    debug: bool = _help(False, "show tracebacks")


@dataclass(frozen=True)
class Request:
    """A checked configuration and what the checks had to read anyway."""

    config: InferConfig
    prompts: list[str]
    glimpse: Glimpse | None  # None: random weights
    variant: Variant | None

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every video to generate."""
        if self.config.seeds:
            return [(prompt, seed) for prompt in self.prompts for seed in self.config.seeds]
        return [(prompt, self.config.seed + index) for index, prompt in enumerate(self.prompts)]

    @property
    def targets(self) -> list[Path]:
        """One path a job: `out.mp4` for one, `out-00-seed7.mp4`, `out-01-seed8.mp4`, ... for several."""
        output = Path(self.config.output).expanduser()
        seeds = [seed for _, seed in self.jobs]
        if len(seeds) == 1:
            return [output]
        digits = max(2, len(str(len(seeds) - 1)))
        return [
            output.with_name(f"{output.stem}-{i:0{digits}d}-seed{seed}{output.suffix}") for i, seed in enumerate(seeds)
        ]


@dataclass(frozen=True)
class ListedRequest(Request):
    """A request whose videos are listed one by one: (prompt, seed, file)."""

    listed: tuple[tuple[str, int, Path], ...] = ()

    @property
    def jobs(self) -> list[tuple[str, int]]:
        return [(prompt, seed) for prompt, seed, _ in self.listed]

    @property
    def targets(self) -> list[Path]:
        return [path for _, _, path in self.listed]


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

    The value of a free-text key is quoted, because Hydra would read commas, brackets and `${` as syntax; one seed becomes a list;
    `model` is another name of `variant`.
    """
    key, separator, value = override.partition("=")
    if key == "model":
        key, override = "variant", f"variant={value}"
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
