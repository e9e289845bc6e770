"""One network on the same held-out prompts and seeds as every other: sampled in batches, judged where the frames lie.

Legend: N clips (prompts times seeds, seeds of a prompt side by side), B clips of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from turbotrain.data.shapes import Clip, Scene
from turbotrain.evaluation.frechet import clip_features
from turbotrain.evaluation.quality import Measured, clip_psnr, clip_ssim
from turbotrain.evaluation.readings import Judgements, compare, read_clips
from turbotrain.pipeline import TurboPipeline

# Clips that are decoded and judged together: a gigabyte of float32 pixels and readings at 81 frames.
JUDGED_TOGETHER = 64
JUDGED_FRAMES = 40
COMPARED_EVERY = 4  # frames: one a latent frame


@dataclass(frozen=True)
class Trial:
    """Held-out clips whose captions are sampled, each `seeds` times, as videos of `frames` frames."""

    clips: Sequence[Clip]
    seeds: int
    frames: int

    @property
    def count(self) -> int:
        return len(self.clips) * self.seeds

    @cached_property
    def scenes(self) -> list[Scene]:
        return [clip.scene for clip in self.clips for _ in range(self.seeds)]

    @cached_property
    def captions(self) -> list[str]:
        return [clip.caption for clip in self.clips for _ in range(self.seeds)]


@torch.inference_mode()
def sample_trial(pipe: TurboPipeline, trial: Trial, sampler: dict[str, Any], batch_size: int) -> Tensor:
    """Latents (N, C, T, H, W) float16 of every clip; clip i draws its noise from seed i, whatever the network.

    sampler: `mode` (teacher | turbo), `steps` and what else `TurboPipeline.sample` takes.
    """
    shape = pipe.latent_shape(frames=trial.frames)
    negative_1LD = pipe.encode_prompts([""])
    latents = []
    for begin in range(0, trial.count, batch_size):
        rows = range(begin, min(begin + batch_size, trial.count))
        context_BLD = pipe.encode_prompts(trial.captions[rows.start : rows.stop])
        guided = sampler["mode"] == "teacher"
        negative_BLD = negative_1LD.expand_as(context_BLD) if guided else None
        latents.append(pipe.sample(context_BLD, rows, shape, negative_BLD=negative_BLD, **sampler).half())
    return torch.cat(latents)


def reference_frames(pipe: TurboPipeline, latents_NCTHW: Tensor) -> Tensor:
    """Every `COMPARED_EVERY`th frame (N, T, H, W, 3) uint8 of the clips that others are compared with."""
    return torch.cat([frames_BTHWC[:, ::COMPARED_EVERY] for _, frames_BTHWC in _decoded(pipe, latents_NCTHW)])


@torch.inference_mode()
def measure_trial(
    pipe: TurboPipeline, trial: Trial, latents_NCTHW: Tensor, reference_NTHWC: Tensor | None = None
) -> Measured:
    """Judge every clip by its own caption and by another prompt's; with `reference_frames` of another network from the same noise
    also PSNR and SSIM to those.

    Of a long clip about `JUDGED_FRAMES` frames are read, evenly spaced from the first on.
    """
    every = max(1, trial.frames // JUDGED_FRAMES)
    others = trial.scenes[trial.seeds :] + trial.scenes[: trial.seeds]  # the next prompt's
    judged, shuffled, features, psnrs, ssims = [], [], [], [], []
    for at, frames_BTHWC in _decoded(pipe, latents_NCTHW):
        read = read_clips(frames_BTHWC[:, ::every])
        judged.append(compare(read, trial.scenes[at]).cpu())
        shuffled.append(compare(read, others[at]).cpu())
        features.append(clip_features(frames_BTHWC).cpu())
        if reference_NTHWC is not None:
            pair = frames_BTHWC[:, ::COMPARED_EVERY], reference_NTHWC[at]
            psnrs.append(clip_psnr(*pair).cpu())
            ssims.append(clip_ssim(*pair).cpu())
    psnr, ssim = (torch.cat(parts).numpy() if parts else None for parts in (psnrs, ssims))
    return Measured(Judgements.joined(judged), torch.cat(features).numpy(), psnr, ssim, Judgements.joined(shuffled))


def _decoded(pipe: TurboPipeline, latents_NCTHW: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(clips, their frames (B, T, H, W, 3) uint8 on the pipeline's device) of all latents in order."""
    for begin in range(0, len(latents_NCTHW), JUDGED_TOGETHER):
        at = slice(begin, begin + JUDGED_TOGETHER)
        yield at, pipe.codec.decode_here(latents_NCTHW[at])
