"""Data stage: clips of the shapes world, rendered, encoded once and written as shards; training never runs the VAE.

Latents of one's own videos come ready-made (`data.kind=shards`, `data.path`): then there is nothing to do here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from turbotrain.codecs.text import TextEncoder
from turbotrain.codecs.vae import VideoCodec
from turbotrain.data.shapes import FRAMES, render_parallel, sample_clips
from turbotrain.data.shapes_gpu import render_on
from turbotrain.data.writing import Sample, write_shards
from turbotrain.stages.artifacts import codec_parts, load_codec
from turbotrain.stages.context import StageContext

RENDERED = 4096 * FRAMES  # frames held in memory at once


def run(context: StageContext) -> dict[str, object]:
    data = context.config.data
    codec, text = load_codec(codec_parts(context), context.device, context.variant)
    if context.config.launch.mixed_precision == "bf16" and context.device.type == "cuda":
        nn.Module.half(
            codec.vae
        )  # as it ships, and as the latents are stored; diffusers' decorator hides the signature
    count = write_shards(
        context.checkpoint,
        _encoded_shapes(context, codec, text),
        _embed(text, [""])[0],
        data.samples_per_shard,
        {
            "kind": "shapes",
            "seed": context.config.seed,
            "width": data.width,
            "height": data.height,
            "frames": data.frames,
        },
    )
    return {"samples": count}


def _encoded_shapes(context: StageContext, codec: VideoCodec, text: TextEncoder) -> Iterator[Sample]:
    data = context.config.data
    seed = context.config.seed
    rendered = max(1, RENDERED // data.frames)
    for begin in range(0, data.count, rendered):
        clips = sample_clips(min(rendered, data.count - begin), seed, start=begin, pairs=data.pairs)
        on_host = None
        if context.device.type != "cuda":
            drawn = render_parallel(len(clips), seed, start=begin, pairs=data.pairs, frames=data.frames)
            on_host = torch.from_numpy(drawn)
        for at in range(0, len(clips), data.batch_size):
            rows = slice(at, at + data.batch_size)
            captions = [clip.caption for clip in clips[rows]]
            frames = render_on(context.device, clips[rows], data.frames) if on_host is None else on_host[rows]
            latents = codec.encode(frames).cpu()
            for caption, latent, embed in zip(captions, latents, _embed(text, captions), strict=True):
                yield Sample(latent, embed, caption)
        context.say(f"{begin + len(clips)}/{data.count} clips encoded")


def _embed(text: TextEncoder, prompts: list[str]) -> Tensor:
    return text.encode(prompts).cpu()
