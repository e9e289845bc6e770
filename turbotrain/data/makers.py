"""Three ways to make samples: by the teacher, from videos, of prompts alone.

Legend: B batch, C channels, T latent frames, H, W latent height and width, L tokens, D their width; clips are uint8
(frames, height, width, 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbotrain.checkpoint.components import find_component
from turbotrain.codecs import PromptEncoder, VideoCodec
from turbotrain.codecs.image import ImageEncoder
from turbotrain.codecs.prompts import prompt_encoder
from turbotrain.conditioning import Conditioning, condition_on_image, load_image
from turbotrain.data.shards import EMBED, LATENT, PROMPT, image_parts
from turbotrain.data.sources import Item
from turbotrain.data.videos import BadVideo, Bucket, nearest_size, read_clip
from turbotrain.data.writing import Sample
from turbotrain.model.variants import Variant, default_negative_prompt
from turbotrain.pipeline import TurboPipeline

PROMPTS = "prompts"  # the bucket of samples without latents
Made = tuple[str, Sample | Exception]


@dataclass(frozen=True)
class Parts:
    """What turns text, images and clips into what a network reads. codec, image_encoder: None where they are not needed."""

    variant: Variant
    prompts: PromptEncoder
    codec: VideoCodec | None
    image_encoder: ImageEncoder | None
    device: torch.device

    @classmethod
    def load(
        cls,
        variant: Variant,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        given: dict[str, str],
        pixels: bool,
    ) -> Parts:
        """From a folder that holds the parts under their published names; `given` replaces some.

        Args:
            dtype: of the VAE. The text encoder of Wan is in bf16, as published.
            pixels: with the VAE, and the image encoder where the variant has one.

        Raises:
            ValueError: a part is nowhere, cannot be read, or is not the variant's.
        """
        places = {name: find_component(name, given, folder) for name in ("text_encoder", "tokenizer")}
        text_dtype = dtype if variant.vae == "shapes" else torch.bfloat16
        prompts = prompt_encoder(places, variant.config, device, text_dtype)
        codec, image = None, None
        if pixels:
            place = find_component("vae", given, folder)
            codec = VideoCodec.from_pretrained(place, device=str(device), dtype=dtype)
            if codec.latent_channels != variant.config.out_channels or codec.stride != variant.vae_stride:
                raise ValueError(
                    f"vae={place!r}: {codec.latent_channels} channels at stride {codec.stride}, but {variant.name} reads "
                    f"{variant.config.out_channels} at {variant.vae_stride}"
                )
        if pixels and variant.config.image_dim is not None:
            image = ImageEncoder(find_component("image_encoder", given, folder), device)
        return cls(variant, prompts, codec, image, device)

    @classmethod
    def of(cls, pipe: TurboPipeline) -> Parts:
        tower = pipe.variant.config.image_dim is not None
        image = ImageEncoder(pipe.components["image_encoder"], pipe.device) if tower else None
        return cls(pipe.variant, pipe.prompts, pipe.codec, image, pipe.device)

    def negative(self) -> Tensor:
        return self.prompts.encode([default_negative_prompt(self.variant)])[0].cpu()

    def conditioning(self, image: Any, bucket: Bucket) -> Conditioning:
        """Of one image for clips of a bucket; nothing for text to video."""
        if image is None and self.variant.config.model_type != "i2v":
            return Conditioning()
        assert self.codec is not None  # networks that read images have one
        shape = self.variant.latent_shape(bucket.frames, bucket.height, bucket.width)
        return condition_on_image(
            self.variant, self.codec, image, shape, device=self.device, image_encoder=self.image_encoder
        )


class TeacherMaker:
    """Latents drawn from the teacher: item i from a generator of its own, seeded with seed + i, whoever draws it.

    sampler: `steps`, `guidance`, `solver`, `grid`, `shift` as `TurboPipeline` takes them. An image decides its item's bucket by
    its aspect ratio; items without images take the buckets in turn.
    """

    def __init__(
        self, pipe: TurboPipeline, buckets: Sequence[Bucket], seed: int, sampler: dict[str, Any], together: int
    ) -> None:
        self.pipe, self.buckets, self.seed, self.sampler, self.together = pipe, buckets, seed, sampler, together
        self.own = Parts.of(pipe)
        self.parts = (LATENT, EMBED, *image_parts(pipe.variant.config), PROMPT)
        self._negative_LD = self.own.negative()

    def negative(self) -> Tensor:
        return self._negative_LD

    def make(self, indices: Sequence[int], items: Sequence[Item]) -> Iterator[Made]:
        made: dict[int, Made] = {}
        with torch.inference_mode():
            embeds_BLD = self.pipe.prompts.encode([item.prompt for item in items])
            alike: dict[tuple[Bucket, tuple[str, ...]], dict[int, Conditioning]] = {}
            for row, (index, item) in enumerate(zip(indices, items)):
                try:
                    bucket, image = self._place(index, item)
                    alike.setdefault((bucket, tuple(image.arguments)), {})[row] = image
                except ValueError as error:
                    made[row] = ("", error)
            for (bucket, _), images in alike.items():
                seeds = {row: self.seed + indices[row] for row in images}
                for row, latent in self._sample(bucket, seeds, images, embeds_BLD).items():
                    sample = (
                        latent
                        if isinstance(latent, Exception)
                        else _sample(latent, embeds_BLD[row], items[row], images[row])
                    )
                    made[row] = (str(bucket), sample)
        for row in range(len(items)):
            yield made[row]

    def _place(self, index: int, item: Item) -> tuple[Bucket, Conditioning]:
        image = None if item.image is None else load_image(item.image)
        bucket = self.buckets[index % len(self.buckets)]
        if image is not None:
            bucket = nearest_size(self.buckets, image.width, image.height)[0]
        return bucket, self.own.conditioning(image, bucket)

    def _sample(
        self, bucket: Bucket, seeds: dict[int, int], images: dict[int, Conditioning], embeds_BLD: Tensor
    ) -> dict[int, Tensor | Exception]:
        """{row: latent (C, T, H, W) or why there is none} for rows of one bucket."""
        rows = list(seeds)
        try:
            latents_BCTHW = self.pipe.sample(
                embeds_BLD[rows],
                list(seeds.values()),
                self.pipe.variant.latent_shape(bucket.frames, bucket.height, bucket.width),
                negative_BLD=self._negative_LD.to(embeds_BLD).expand(len(rows), -1, -1),
                conditioning=_joined([images[row] for row in rows]),
                mode="teacher",
                **self.sampler,
            )
        except ValueError as error:  # not finite: which row, a batch does not say
            if len(rows) == 1:
                return {rows[0]: error}
            alone = [self._sample(bucket, {row: seeds[row]}, images, embeds_BLD) for row in rows]
            return {row: latent for one in alone for row, latent in one.items()}
        return dict(zip(rows, latents_BCTHW, strict=True))


class VideoMaker:
    """Latents of clips; for image-to-video networks the first frame is the image."""

    together = 1

    def __init__(self, own: Parts, buckets: Sequence[Bucket], fps: float) -> None:
        assert own.codec is not None  # loaded for videos
        self.own, self.codec, self.buckets, self.fps = own, own.codec, buckets, fps
        self.parts = (LATENT, EMBED, *image_parts(own.variant.config), PROMPT)
        self._reads_image = own.variant.config.model_type == "i2v"

    def negative(self) -> Tensor:
        return self.own.negative()

    def make(self, indices: Sequence[int], items: Sequence[Item]) -> Iterator[Made]:
        for item in items:
            try:
                yield self._make(item)
            except (BadVideo, OSError) as error:
                yield "", error

    def _make(self, item: Item) -> Made:
        if item.video is None:
            raise BadVideo(f"prompt {item.prompt[:40]!r}... names no video")
        bucket, frames_THWC = read_clip(item.video, self.buckets, self.fps, item.start)
        with torch.inference_mode():
            latent = self.codec.encode(torch.from_numpy(frames_THWC)[None])[0]
            image = self.own.conditioning(frames_THWC[0], bucket) if self._reads_image else Conditioning()
            embed = self.own.prompts.encode([item.prompt])[0]
        if not bool(torch.isfinite(latent).all()):
            raise BadVideo(f"{item.video}: the VAE gave latents that are not finite; try --dtype float32")
        return str(bucket), _sample(latent, embed, item, image)


class PromptMaker:
    """Embeddings alone, for distillation from noise; with images, their conditioning for clips of one bucket."""

    together = 64

    def __init__(self, own: Parts, bucket: Bucket) -> None:
        self.own, self.bucket = own, bucket
        self.parts = (EMBED, *image_parts(own.variant.config), PROMPT)

    def negative(self) -> Tensor:
        return self.own.negative()

    def make(self, indices: Sequence[int], items: Sequence[Item]) -> Iterator[Made]:
        with torch.inference_mode():
            embeds_BLD = self.own.prompts.encode([item.prompt for item in items])
            for item, embed in zip(items, embeds_BLD):
                try:
                    image = self.own.conditioning(item.image, self.bucket) if len(self.parts) > 2 else Conditioning()
                    yield PROMPTS, _sample(None, embed, item, image)
                except ValueError as error:
                    yield PROMPTS, error


def _sample(latent_CTHW: Tensor | None, embed_LD: Tensor, item: Item, image: Conditioning) -> Sample:
    y, clip = (None if x is None else x[0].cpu() for x in (image.y_BCTHW, image.clip_BLD))
    return Sample(None if latent_CTHW is None else latent_CTHW.cpu(), embed_LD.cpu(), item.prompt, y, clip)


def _joined(given: Sequence[Conditioning]) -> Conditioning:
    """Of several images, one row each."""
    names = given[0].arguments
    return Conditioning(**{name: torch.cat([one.arguments[name] for one in given]) for name in names})
