"""Data stage: clips of the shapes world, rendered, encoded once and written as shards; training never runs the VAE.

Latents of one's own videos come ready-made (`data.kind=shards`, `data.path`): then there is nothing to do here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from turbotrain.codecs.text import TextEncoder
from turbotrain.codecs.vae import VideoCodec
from turbotrain.data.latents import Sample, write_shards
from turbotrain.data.shapes import render_batch, sample_clips
from turbotrain.stages.artifacts import codec_parts, load_codec
from turbotrain.stages.context import StageContext


def run(context: StageContext) -> dict[str, object]:
    data = context.config.data
    codec, text = load_codec(codec_parts(context), context.device, context.variant)
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
    for begin in range(0, data.count, data.batch_size):
        count = min(data.batch_size, data.count - begin)
        clips = sample_clips(count, context.config.seed, split="train", start=begin)
        latents = codec.encode(torch.from_numpy(render_batch(clips))).cpu()
        embeds = _embed(text, [clip.caption for clip in clips])
        for clip, latent, embed in zip(clips, latents, embeds, strict=True):
            yield Sample(latent, embed, clip.caption)
        done = begin + len(clips)
        if done == data.count or (begin // data.batch_size) % 16 == 15:
            context.say(f"{done}/{data.count} clips encoded")


def _embed(text: TextEncoder, prompts: list[str]) -> Tensor:
    return text.encode(prompts).cpu()
