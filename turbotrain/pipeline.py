"""Prompt in, frames out: text encoder -> sampler -> VAE, with everything that matters read from the checkpoint's metadata.

One object serves `infer.py`, evaluation and notebooks. A batch of N videos equals N single ones up to the rounding of batched
matrix products, because every video draws its noise from a generator of its own seed; the same seed on the same kind of device
gives the same frames in any process.

Shapes: B videos, C latent channels, T latent frames, H, W latent height and width, L text tokens, D their width; frames are uint8
(T', H', W', 3).
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from turbotrain.checkpoint import CheckpointMeta, load_transformer, read_meta
from turbotrain.checkpoint.components import find_component
from turbotrain.checkpoint.header import expert_folders
from turbotrain.codecs import PromptEncoder, TextEncoder, VideoCodec
from turbotrain.codecs.prompts import prompt_encoder
from turbotrain.codecs.text import clean
from turbotrain.conditioning import Conditioning, condition_on_image, load_image, size_for_area
from turbotrain.diffusion.guidance import guided, switch_experts
from turbotrain.diffusion.samplers import (
    TURBO_TIMES,
    Grid,
    Solver,
    draw_noise,
    sample_teacher,
    sample_turbo,
    seeded_generators,
)
from turbotrain.diffusion.velocity import Velocity, bind
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, Variant, WanConfig, default_negative_prompt

Callback = Callable[[int, int], None]  # (step just done, steps in all)
NO_NEGATIVE = "negative_prompt has no effect: the Turbo sampler has no guidance, only the teacher's sampler has"
logger = logging.getLogger(__name__)


@dataclass
class PipelineResult:
    """What a call returns.

    Attributes:
        videos: one uint8 (T', H', W', 3) array a video, in the order of the prompts.
        latents: (B, C, T, H, W) float32, normalised as the network sees them, on the CPU.
        timings: seconds by phase: `text`, `dit`, `vae`, and `dit_steps`, one number a network step (of the last batch).
    """

    videos: list[np.ndarray]
    latents: Tensor
    prompts: list[str]
    seeds: list[int]
    fps: float
    timings: dict[str, Any] = field(default_factory=dict)
    single: bool = False

    @property
    def frames(self) -> Any:
        """The video itself where one prompt was given as a string, else the list of videos."""
        return self.videos[0] if self.single else self.videos


class TurboPipeline:
    """Text (and image) to video with a Wan network, its text encoder and its VAE.

    Args:
        experts: one network, or (high noise, low noise) of a two-expert variant.
        codec, text_encoder: shared freely between pipelines; they hold no state of a call. A plain TextEncoder stays where it is.
        variant: sampling defaults; `meta.sampler` overrides those of the Turbo sampler.
        components: places of further parts that are loaded when a call needs them (`image_encoder`).
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        codec: VideoCodec,
        text_encoder: TextEncoder | PromptEncoder,
        variant: Variant,
        meta: CheckpointMeta | None = None,
        device: str | torch.device = "cpu",
        components: dict[str, str] | None = None,
    ) -> None:
        if len(experts) != len(variant.experts):
            raise ValueError(
                f"{len(experts)} network(s) given: variant {variant.name} has {len(variant.experts)} expert(s); "
                "a two-expert checkpoint is a folder with high/ and low/"
            )
        self.experts = [expert.eval() for expert in experts]
        self.codec = codec
        self.device = torch.device(device)
        if isinstance(text_encoder, TextEncoder):
            text_encoder = PromptEncoder.holding(text_encoder, self.device)
        self.prompts = text_encoder
        self.variant = variant
        self.meta = meta
        self.components = components or {}

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        *,
        variant: str | None = None,
        components: dict[str, str] | None = None,
        attention_kind: str | None = None,
        text_device: str = "auto",
        text_dtype: str = "auto",
        text_cache: Path | None = None,
    ) -> TurboPipeline:
        """Loads a Turbo checkpoint with the components that its metadata names.

        Args:
            path: folder (with `high/` and `low/` for two experts) or single file.
            device: `auto` takes cuda where there is one.
            dtype: of the network; None: float32 on the CPU, the checkpoint's own (bfloat16 where it says nothing) on cuda; int8
                layers stay int8 unless a dtype is given.
            variant: for files of other projects, whose metadata does not say; must agree with metadata that does.
            attention_kind: `sla` or `sage_sla` (8-bit attention) for a checkpoint of either; None: what it says.
            components: `vae`, `text_encoder`, `tokenizer`, `image_encoder`: paths or hub ids that replace or complete the
                metadata's; an official Wan folder or a diffusers pipeline brings its own.
            text_device, text_dtype: as `codecs.prompts.prompt_encoder` takes them.
            text_cache: folder of text embeddings, of earlier runs and for later ones; None: none.

        Raises:
            ValueError: a component is missing or of other dimensions, the variant is unknown, no such device, dense attention.
        """
        path = Path(path).expanduser()
        place = resolve_device(device)
        folders = list(expert_folders(path) or (path,))
        metas = [read_meta(folder) for folder in folders]
        meta = metas[0]
        if variant is not None and meta.variant and meta.variant != variant:
            raise ValueError(f"variant={variant!r}: {path} says it is {meta.variant!r}; leave variant out")
        name = variant or meta.variant
        if name not in VARIANTS:
            raise ValueError(f"variant={name!r}: unknown for {path}; say variant= one of {', '.join(VARIANTS)}")
        if attention_kind is not None and not all(
            AttentionConfig.from_dict(part.attention).is_sparse for part in metas
        ):
            raise ValueError(
                f"attention_kind={attention_kind!r}: {path} was trained with dense attention; leave it out"
            )
        parts = {**meta.components, **{key: value for key, value in (components or {}).items() if value}}
        config = WanConfig.from_dict(meta.config)
        wanted = ["vae", "text_encoder", "tokenizer", *(["image_encoder"] if config.image_dim is not None else [])]
        places = {key: find_component(key, parts, path) for key in wanted}
        side_dtype = _network_dtype(None if place.type == "cpu" else dtype, replace(meta, quantization=None), place)
        codec = VideoCodec.from_pretrained(places["vae"], device=str(place), dtype=side_dtype)
        if codec.latent_channels != config.out_channels:
            raise ValueError(
                f"vae={places['vae']}: gives {codec.latent_channels} latent channels, but {path} was trained on "
                f"{config.out_channels}; use the VAE of variant {name}"
            )
        # umT5-XXL is published, and used by Wan, in bf16; small worlds have encoders of their own.
        text_default = side_dtype if VARIANTS[name].vae == "shapes" else torch.bfloat16
        text = prompt_encoder(places, config, place, text_default, text_device, text_dtype, text_cache)
        attention = None if attention_kind is None else {"kind": attention_kind}
        experts = [
            load_transformer(folder, str(place), _network_dtype(dtype, part, place), attention)
            for folder, part in zip(folders, metas)
        ]
        return cls(experts, codec, text, VARIANTS[name], meta, place, places)

    @property
    def text_encoder(self) -> TextEncoder:
        return self.prompts.text_encoder

    def with_networks(self, experts: Sequence[nn.Module], meta: CheckpointMeta | None = None) -> TurboPipeline:
        """This pipeline with other networks: codec, text encoder and text embeddings stay shared."""
        other = copy.copy(self)
        if len(experts) != len(self.experts):
            raise ValueError(f"{len(experts)} network(s) given: variant {self.variant.name} has {len(self.experts)}")
        other.experts = [expert.eval() for expert in experts]
        other.meta = meta if meta is not None else self.meta
        return other

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        steps: int | None = None,
        seed: int = 0,
        *,
        seeds: Sequence[int] | None = None,
        mode: str = "turbo",
        guidance: float | None = None,
        solver: Solver = "unipc",
        grid: Grid = "wan",
        shift: float | None = None,
        ode: bool | None = None,
        sigma_max: float | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        negative_prompt: str | None = None,
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> PipelineResult:
        """Generates one video a prompt.

        Args:
            image: first frame (path, PIL image or uint8 (H', W', 3)) for i2v and ti2v variants.
            steps: network evaluations; default 4 (`turbo`) or the variant's (`teacher`).
            seed, seeds: video j uses seed + j, or seeds[j].
            mode: `turbo` (method.md 6: no guidance) or `teacher` (method.md 2: `guidance`, `solver`, `grid`, `shift`).
            width, height, frames: pixels and frames of the video; default: the variant's.
            batch_size: videos sampled together; default: all.
            callback: called after each network step with (step, steps).

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        start = time.perf_counter()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(clean(text) for text in prompts):
            raise ValueError(f"prompt = {prompt!r}: empty; say what the video shows")
        row_seeds = list(seeds) if seeds is not None else [seed + j for j in range(len(prompts))]
        if len(row_seeds) != len(prompts):
            raise ValueError(f"seeds = {row_seeds}: {len(row_seeds)} seeds for {len(prompts)} prompts; give one each")
        if image is not None and self.variant.config.model_type != "t2v":
            image = load_image(image)
            if height is None and width is None:
                height, width = size_for_area(
                    image, self.variant.height * self.variant.width, self.variant.size_multiple
                )
        shape = self.latent_shape(frames, height, width)
        if mode == "turbo" and negative_prompt is not None:
            logger.warning(NO_NEGATIVE)
        negative = default_negative_prompt(self.variant) if negative_prompt is None else negative_prompt

        with torch.inference_mode():
            self.encode_prompts([*prompts, *([negative] if mode == "teacher" else [])])
            timings: dict[str, Any] = {"text": self._clock() - start, "dit": 0.0, "vae": 0.0, "dit_steps": []}
            conditioning = condition_on_image(self.variant, self.codec, image, shape, self.components, self.device)
            latents: list[Tensor] = []
            videos: list[np.ndarray] = []
            for rows in _batches(len(prompts), batch_size):
                chunk = [prompts[j] for j in rows]
                with self._phase(timings, "dit"):
                    latents_BCTHW = self.sample(
                        self.encode_prompts(chunk),
                        [row_seeds[j] for j in rows],
                        shape,
                        negative_BLD=self.encode_prompts([negative] * len(chunk)) if mode == "teacher" else None,
                        conditioning=conditioning,
                        mode=mode,
                        steps=steps,
                        guidance=guidance,
                        solver=solver,
                        grid=grid,
                        shift=shift,
                        ode=ode,
                        sigma_max=sigma_max,
                        callback=self._step_clock(timings, callback),
                    )
                with self._phase(timings, "vae"):
                    videos += self.decode(latents_BCTHW)
                latents.append(latents_BCTHW.float().cpu())
        return PipelineResult(
            videos, torch.cat(latents), prompts, row_seeds, float(self.variant.fps), timings, isinstance(prompt, str)
        )

    def latent_shape(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of one video. Raises ValueError for lengths and sizes that do not fit."""
        stride_t, stride_h, stride_w = self.codec.stride
        patch_t, patch_h, patch_w = self.experts[0].config.patch_size  # type: ignore[union-attr]  # WanTransformer
        frames = self.variant.frames if frames is None else frames
        sizes = {
            "height": self.variant.height if height is None else height,
            "width": self.variant.width if width is None else width,
        }
        unit = stride_t * patch_t
        if frames < 1 or (frames - 1) % unit:
            below = max(0, frames - 1) // unit * unit + 1
            raise ValueError(f"frames = {frames}: must be {unit}n + 1, for example {below} or {below + unit}")
        for (name, value), unit in zip(sizes.items(), (stride_h * patch_h, stride_w * patch_w)):
            if value < 1 or value % unit:
                below = max(unit, value // unit * unit)
                raise ValueError(
                    f"{name} = {value}: must be divisible by {unit}, for example {below} or {below + unit}"
                )
        return (
            self.codec.latent_channels,
            (frames - 1) // stride_t + 1,
            sizes["height"] // stride_h,
            sizes["width"] // stride_w,
        )

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) float32 text embeddings; each distinct prompt is encoded once in the pipeline's life."""
        return self.prompts(prompts)

    def sample(
        self,
        context_BLD: Tensor,
        seeds: Sequence[int],
        shape: tuple[int, int, int, int],
        *,
        mode: str = "turbo",
        steps: int | None = None,
        negative_BLD: Tensor | None = None,
        conditioning: Conditioning | None = None,
        guidance: float | None = None,
        solver: Solver = "unipc",
        grid: Grid = "wan",
        shift: float | None = None,
        ode: bool | None = None,
        sigma_max: float | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Latents (B, C, T, H, W) from text embeddings and one seed a row; arguments as in `__call__`.

        Raises:
            ValueError: mode, steps, guidance out of range.
        """
        generators = seeded_generators(seeds, self.device)
        noise_BCTHW = draw_noise((len(generators), *shape), generators)
        conditioning = (conditioning or Conditioning()).for_batch(len(seeds))
        if mode == "turbo":
            settings = self.turbo_settings(steps, ode, sigma_max)
            hook = _counted(callback, settings["steps"])
            latents_BCTHW = sample_turbo(
                self._velocity(context_BLD, conditioning),
                noise_BCTHW,
                generators=generators,
                callback=hook,
                **settings,
            )
        elif mode == "teacher":
            steps = self.variant.teacher_steps if steps is None else steps
            if not 1 <= steps <= 1000:
                raise ValueError(f"steps = {steps}: the teacher sampler takes 1 to 1000")
            if negative_BLD is None:
                raise ValueError("negative_BLD is missing: teacher sampling needs the negative prompt's embedding")
            latents_BCTHW = sample_teacher(
                self._velocity(context_BLD, conditioning, negative_BLD, guidance),
                noise_BCTHW,
                steps=steps,
                shift=self.variant.shift if shift is None else shift,
                solver=solver,
                grid=grid,
                callback=_counted(callback, steps),
            )
        else:
            raise ValueError(f"mode = {mode!r}: choose turbo or teacher")
        if not bool(torch.isfinite(latents_BCTHW).all()):
            raise ValueError(
                "the network gave latents that are not finite: its weights are damaged, or overflow in this dtype; "
                "try dtype=float32 or another checkpoint"
            )
        return conditioning.restore(latents_BCTHW).float()

    def turbo_settings(
        self, steps: int | None = None, ode: bool | None = None, sigma_max: float | None = None
    ) -> dict[str, Any]:
        """Arguments of the Turbo sampler: what is given here, else what the checkpoint says, else the variant's."""
        told = (self.meta.sampler if self.meta else None) or {}
        later = tuple(told.get("times") or TURBO_TIMES)  # TrigFlow times of the steps after the first
        steps = len(later) + 1 if steps is None else steps
        if not 1 <= steps <= len(later) + 1:
            raise ValueError(f"steps = {steps}: the Turbo sampler of this checkpoint takes 1 to {len(later) + 1}")
        sigma = float(told.get("sigma_max", self.variant.sigma_max)) if sigma_max is None else sigma_max
        least = math.tan(later[0]) if steps > 1 else 0.0
        if not sigma > least:
            raise ValueError(f"sigma_max = {sigma:g}: must be above {least:.4g}, the noise level of the second step")
        return {
            "steps": steps,
            "times": [math.atan(sigma), *later][:steps],
            "ode": bool(told.get("ode", False)) if ode is None else ode,
            "sigma_max": sigma,
        }

    def decode(self, latents_BCTHW: Tensor) -> list[np.ndarray]:
        """One uint8 (T', H', W', 3) array a latent."""
        frames_BTHWC = self.codec.decode(latents_BCTHW)
        return list(torch.as_tensor(frames_BTHWC).cpu().numpy())

    def _velocity(
        self,
        context_BLD: Tensor,
        conditioning: Conditioning,
        negative_BLD: Tensor | None = None,
        guidance: float | None = None,
    ) -> Velocity:
        velocities: list[Velocity] = []
        for index, expert in enumerate(self.experts):
            velocity: Velocity = bind(expert, context_BLD, **conditioning.arguments)
            if negative_BLD is not None:
                low_scale, high_scale = self.variant.cfg
                scale = (
                    (high_scale if index == 0 and len(self.experts) > 1 else low_scale)
                    if guidance is None
                    else guidance
                )
                velocity = guided(velocity, bind(expert, negative_BLD, **conditioning.arguments), scale)
            velocities.append(velocity)
        if len(velocities) == 1:
            return velocities[0]
        assert self.variant.boundary is not None  # every two-expert variant has one
        return switch_experts(velocities[0], velocities[1], self.variant.boundary)

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read afterwards means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _clock(self) -> float:
        self.synchronize()
        return time.perf_counter()

    @contextmanager
    def _phase(self, timings: dict[str, Any], name: str) -> Iterator[None]:
        start = self._clock()
        yield
        timings[name] += self._clock() - start

    def _step_clock(self, timings: dict[str, Any], callback: Callback | None) -> Callback:
        timings["dit_steps"] = []
        last = self._clock()

        def step(done: int, total: int) -> None:
            nonlocal last
            now = self._clock()
            timings["dit_steps"].append(now - last)
            last = now
            if callback is not None:
                callback(done, total)

        return step


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is cuda where there is one, else cpu. Raises ValueError for a cuda device that is not there."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(device)
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            raise ValueError(
                f"device = {str(device)!r}: torch sees {count} CUDA device(s); use device=cpu or device=auto"
            )
    return place


def _network_dtype(dtype: torch.dtype | None, meta: CheckpointMeta, device: torch.device) -> torch.dtype | None:
    if dtype is not None or meta.quantization:
        return dtype  # None keeps int8 layers int8
    if device.type == "cpu":
        return torch.float32
    return getattr(torch, meta.dtype, torch.bfloat16) if meta.dtype else torch.bfloat16


def _counted(callback: Callback | None, total: int) -> Callable[[int, Tensor], None] | None:
    """The samplers report (index, clean prediction); users are told (steps done, steps in all)."""
    return None if callback is None else lambda index, _: callback(index + 1, total)


def _batches(count: int, size: int | None) -> list[range]:
    if size is not None and size < 1:
        raise ValueError(f"batch_size = {size}: must be at least 1")
    step = count if size is None else size
    return [range(start, min(start + step, count)) for start in range(0, count, step)]
