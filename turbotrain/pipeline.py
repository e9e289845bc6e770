"""Prompt in, frames out: text encoder -> sampler -> VAE, with everything that matters read from the checkpoint's metadata.

One object serves `infer.py`, evaluation and notebooks. A batch of N videos equals N single ones up to the rounding of batched
matrix products, because every video draws its noise from a generator of its own seed; the same seed on the same kind of device
gives the same frames in any process.

Shapes: B videos, C latent channels, T latent frames, H, W latent height and width, L text tokens, D their width; frames are uint8
(T', H', W', 3).
"""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from turbotrain.checkpoint import CheckpointMeta
from turbotrain.codecs import PromptEncoder, TextEncoder, VideoCodec
from turbotrain.codecs.text import clean
from turbotrain.codecs.tiles import decode_in_tiles
from turbotrain.conditioning import Conditioning, condition_on_image
from turbotrain.diffusion.samplers import draw_noise, seeded_generators
from turbotrain.images import load_image
from turbotrain.loading import load_codec, load_networks, load_prompt_encoder, read_source, resolve_device
from turbotrain.model.graphs import GraphCache
from turbotrain.model.variants import Variant, default_negative_prompt
from turbotrain.placement.budget import Setting
from turbotrain.placement.residence import Residence
from turbotrain.sampling import (
    SamplerOptions,
    StepCallback,
    TeacherSettings,
    TurboSettings,
    network_velocity,
    sampler_settings,
)
from turbotrain.sizes import video_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

Callback = Callable[[int, int], None]  # (step just done, steps in all)
Preview = Callable[[int, int, np.ndarray], None]  # (index of the video, step just done, what its frames would be now)
FramesCallback = Callable[[int, np.ndarray], None]  # (index of the video, its next frames)
UNDISTILLED = (
    "the checkpoint is not distilled: the Turbo sampler shows little of what it can do; sampling=teacher is made for it"
)
NO_NEGATIVE = "negative_prompt has no effect: the Turbo sampler has no guidance, only the teacher's sampler has"
logger = logging.getLogger(__name__)


@dataclass
class PipelineResult:
    """What a call returns.

    Attributes:
        videos: one uint8 (T', H', W', 3) array a video, in the order of the prompts.
        latents: (B, C, T, H, W) float32, normalised as the network sees them, on the CPU.
        timings: seconds by phase: `text`, `dit`, `vae` (the image's encoding too), and `dit_steps`, one number a network step (of
            the last batch).
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


P = ParamSpec("P")
R = TypeVar("R")


def _on_its_device(
    method: Callable[Concatenate[TurboPipeline, P], R],
) -> Callable[Concatenate[TurboPipeline, P], R]:
    """The method with its pipeline's GPU as the current one, on which kernels are launched and graphs recorded."""

    @functools.wraps(method)
    def call(pipe: TurboPipeline, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device(pipe.device) if pipe.device.type == "cuda" else nullcontext():
            return method(pipe, *args, **kwargs)

    return call


class TurboPipeline:
    """Text (and image) to video with a Wan network, its text encoder and its VAE.

    Args:
        experts: one network, or (high noise, low noise) of a two-expert variant.
        codec, text_encoder: shared freely between pipelines; they hold no state of a call. A plain TextEncoder stays where it is.
        variant: sampling defaults; `meta.sampler` overrides those of the Turbo sampler.
        components: places of further parts that are loaded when a call needs them (`image_encoder`).
        setting: how the parts share the device; None: the networks stay where they are.

    Attributes:
        graphs: CUDA graphs of the networks, recorded where that pays; None launches every kernel of every step.
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
        setting: Setting | None = None,
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
        self.setting = setting or Setting()
        self.residence = None
        if setting is not None:
            self.residence = Residence(self.experts, self.device, setting)
            codec.chunk = setting.vae_chunk
        self.graphs = GraphCache() if self.device.type == "cuda" and self.setting.graphs else None

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
        setting: Setting | None = None,
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
            setting: how the parts share the device, as `placement.plan.choose` finds it (its `text` then replaces `text_device`);
                None: everything but the text encoder stays there.

        Raises:
            ValueError: a component is missing or of other dimensions, the variant is unknown, no such device, dense attention.
        """
        source = read_source(path, variant, attention_kind)
        place = resolve_device(device)
        places = source.find_components(components)
        codec = load_codec(source, places["vae"], place, dtype)
        text_device = text_device if setting is None else setting.text
        text = load_prompt_encoder(source, places, place, dtype, text_device, text_dtype, text_cache)
        home = torch.device("cpu") if setting is not None and setting.offload != "none" else place
        experts = load_networks(source, place, dtype, home)
        return cls(experts, codec, text, source.variant, source.meta, place, places, setting)

    @property
    def text_encoder(self) -> TextEncoder:
        return self.prompts.text_encoder

    def with_networks(self, experts: Sequence[nn.Module], meta: CheckpointMeta | None = None) -> TurboPipeline:
        """This pipeline with other networks: codec, text encoder and text embeddings stay shared."""
        other = copy.copy(self)
        if len(experts) != len(self.experts):
            raise ValueError(f"{len(experts)} network(s) given: variant {self.variant.name} has {len(self.experts)}")
        other.experts = [expert.eval() for expert in experts]
        other.residence = None
        other.meta = meta if meta is not None else self.meta
        return other

    @_on_its_device
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        steps: int | None = None,
        seed: int = 0,
        *,
        seeds: Sequence[int] | None = None,
        resolution: str | None = None,
        aspect: str | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        negative_prompt: str | None = None,
        batch_size: int | None = None,
        callback: Callback | None = None,
        preview: Preview | None = None,
        on_frames: FramesCallback | None = None,
        **sampler: Unpack[SamplerOptions],
    ) -> PipelineResult:
        """Generates one video a prompt.

        Args:
            image: first frame (path, PIL image or uint8 (H', W', 3)) for i2v and ti2v variants; what does not fit the video's
                aspect is cut off evenly.
            steps: network evaluations; default 4 (`turbo`) or the variant's (`teacher`).
            seed, seeds: video j uses seed + j, or seeds[j].
            resolution, aspect: size by name, as `sizes.video_size` takes them (`480p`, `16:9`, `adaptive`, ...); by default the
                variant's resolution in the image's own aspect, or the variant's size where there is no image.
            width, height: size in pixels instead. frames: 4 n + 1; default: the variant's.
            batch_size: videos sampled together; default: all.
            callback: called after each network step with (step, steps).
            preview: called after each network step but the last with (index of the video, step, the frames of its clean
                prediction); each costs a whole VAE decoding, which the timings leave out.
            on_frames: called with (index of the video, the uint8 frames (t, H', W', 3) that follow those before) while later ones
                are still being decoded: `VideoSink.write`, for instance.
            sampler: as `SamplerOptions` lists them.

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
        picture = None if image is None else load_image(image)
        own = None if picture is None else (picture.height, picture.width)
        height, width = video_size(self.variant, resolution, aspect, height, width, own)
        shape = self.latent_shape(frames, height, width)
        settings = self.settings(steps, (height, width), **sampler)
        is_guided = isinstance(settings, TeacherSettings)
        if not is_guided and negative_prompt is not None:
            logger.warning(NO_NEGATIVE)
        negative = default_negative_prompt(self.variant) if negative_prompt is None else negative_prompt

        with torch.inference_mode():
            self.encode_prompts([*prompts, *([negative] if is_guided else [])])
            timings: dict[str, Any] = {"text": self._clock() - start, "dit": 0.0, "vae": 0.0, "dit_steps": []}
            with self._phase(timings, "vae"):
                conditioning = condition_on_image(
                    self.variant, self.codec, picture, shape, self.components, self.device
                )
            latents: list[Tensor] = []
            videos: list[np.ndarray] = []
            for rows in _batches(len(prompts), batch_size):
                chunk = [prompts[j] for j in rows]
                with self._phase(timings, "dit"):
                    latents_BCTHW = self._denoise(
                        self.encode_prompts(chunk),
                        [row_seeds[j] for j in rows],
                        shape,
                        settings,
                        self.encode_prompts([negative] * len(chunk)) if is_guided else None,
                        conditioning,
                        self._step_clock(timings, settings.steps, rows, conditioning, callback, preview),
                    )
                with self._phase(timings, "vae"):
                    videos += self.decode(latents_BCTHW, on_frames, rows.start)
                latents.append(latents_BCTHW.float().cpu())
        return PipelineResult(
            videos, torch.cat(latents), prompts, row_seeds, float(self.variant.fps), timings, isinstance(prompt, str)
        )

    def latent_shape(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of one video, by default the variant's. Raises ValueError for what does not fit."""
        variant = self.variant
        return variant.latent_shape(
            variant.frames if frames is None else frames,
            variant.height if height is None else height,
            variant.width if width is None else width,
        )

    @_on_its_device
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) float32 text embeddings; each distinct prompt is encoded once in the pipeline's life."""
        return self.prompts(prompts)

    def settings(
        self, steps: int | None = None, size: tuple[int, int] | None = None, **sampler: Unpack[SamplerOptions]
    ) -> TurboSettings | TeacherSettings:
        """The numbers of the sampler for this checkpoint. Raises ValueError as `sampling.sampler_settings` does."""
        return sampler_settings(self.variant, self.meta.sampler if self.meta else None, steps, size, **sampler)

    @_on_its_device
    def sample(
        self,
        context_BLD: Tensor,
        seeds: Sequence[int],
        shape: tuple[int, int, int, int],
        *,
        steps: int | None = None,
        negative_BLD: Tensor | None = None,
        conditioning: Conditioning | None = None,
        callback: Callback | None = None,
        **sampler: Unpack[SamplerOptions],
    ) -> Tensor:
        """Latents (B, C, T, H, W) from text embeddings and one seed a row; arguments as in `__call__`.

        Raises:
            ValueError: mode, steps, guidance out of range.
        """
        _, stride_h, stride_w = self.variant.vae_stride
        settings = self.settings(steps, (shape[2] * stride_h, shape[3] * stride_w), **sampler)
        on_step = None if callback is None else lambda index, _: callback(index + 1, settings.steps)
        return self._denoise(context_BLD, seeds, shape, settings, negative_BLD, conditioning, on_step)

    def _denoise(
        self,
        context_BLD: Tensor,
        seeds: Sequence[int],
        shape: tuple[int, int, int, int],
        settings: TurboSettings | TeacherSettings,
        negative_BLD: Tensor | None = None,
        conditioning: Conditioning | None = None,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        conditioning = (conditioning or Conditioning()).for_batch(len(seeds))
        cfg = (1.0, 1.0)
        if isinstance(settings, TeacherSettings):
            cfg = settings.cfg
            if negative_BLD is None:
                raise ValueError("negative_BLD is missing: teacher sampling needs the negative prompt's embedding")
        networks = self.experts if self.graphs is None else [self.graphs.network(expert) for expert in self.experts]
        # Weights that come for a call of the network, swapped or sharded while it trains, are not there between two.
        come = any(module._forward_pre_hooks for expert in self.experts for module in expert.modules())
        encode_once = not come and (self.residence is None or not self.residence.swaps)
        velocity = network_velocity(
            networks, context_BLD, conditioning, self.variant.boundary, negative_BLD, cfg, encode_once
        )
        generators = seeded_generators(seeds, self.device)
        noise_BCTHW = draw_noise((len(generators), *shape), generators)
        latents_BCTHW = settings.sample(velocity, noise_BCTHW, generators, on_step)
        if not bool(torch.isfinite(latents_BCTHW).all()):
            raise ValueError(
                "the network gave latents that are not finite: its weights are damaged, or overflow in this dtype; "
                "try dtype=float32 or another checkpoint"
            )
        return conditioning.restore(latents_BCTHW).float()

    @_on_its_device
    def decode(
        self, latents_BCTHW: Tensor, on_frames: FramesCallback | None = None, first: int = 0
    ) -> list[np.ndarray]:
        """One uint8 (T', H', W', 3) array a latent. `on_frames` is told as in `__call__`, of videos `first` and following."""
        if self.residence is not None:
            self.residence.release()
        if self.setting.vae_tile is not None:  # whose frames are all there or none
            videos = list(decode_in_tiles(self.codec, latents_BCTHW, self.setting.vae_tile).cpu().numpy())
            if on_frames is not None:
                for index, frames_THWC in enumerate(videos):
                    on_frames(first + index, frames_THWC)
            return videos
        out_BTHWC = self.codec.host_frames(latents_BCTHW)
        for clips, frames_BTHWC in self.codec.decode_stream(latents_BCTHW, out_BTHWC):
            for clip, frames_THWC in zip(clips, frames_BTHWC.numpy()):
                if on_frames is not None:
                    on_frames(first + clip, frames_THWC)
        return list(out_BTHWC.numpy())

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

    def _step_clock(
        self,
        timings: dict[str, Any],
        total: int,
        rows: range,
        conditioning: Conditioning,
        callback: Callback | None,
        preview: Preview | None,
    ) -> StepCallback:
        """Tells of each step of the videos `rows`, and keeps the time that it took."""
        timings["dit_steps"] = []
        last = self._clock()

        def on_step(index: int, clean_BCTHW: Tensor) -> None:
            nonlocal last
            now = self._clock()
            timings["dit_steps"].append(now - last)
            if callback is not None:
                callback(index + 1, total)
            if preview is not None and index + 1 < total:
                restored_BCTHW = conditioning.for_batch(len(rows)).restore(clean_BCTHW)
                for row, frames_THWC in zip(rows, self.decode(restored_BCTHW)):
                    preview(row, index + 1, frames_THWC)
            last = self._clock()
            timings["dit"] -= last - now  # `_phase` adds it again

        return on_step


def _batches(count: int, size: int | None) -> list[range]:
    if size is not None and size < 1:
        raise ValueError(f"batch_size = {size}: must be at least 1")
    step = count if size is None else size
    return [range(start, min(start + step, count)) for start in range(0, count, step)]
