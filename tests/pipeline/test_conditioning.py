"""Image to video: what the network is given besides text, for each family (formats.md 12)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LATENT, random_network
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from turbotrain.codecs.image import clip_tokens
from turbotrain.conditioning import Conditioning, condition_on_image
from turbotrain.images import load_image
from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import VARIANTS, Variant
from turbotrain.pipeline import TurboPipeline

PROMPT = "a small red circle moves left slowly on a black background"


def picture(height: int = 64, width: int = 64, level: int = 200) -> np.ndarray:
    image_HWC = np.full((height, width, 3), 30, np.uint8)
    image_HWC[height // 4 : height // 2, width // 4 : width // 2] = (level, 60, 10)
    return image_HWC


def tiny_variant(kind: str, image_dim: int | None = None) -> Variant:
    base = VARIANTS["shapes"]
    channels = LATENT[0] + 4 + LATENT[0] if kind == "i2v" else LATENT[0]
    return replace(base, config=replace(base.config, model_type=kind, in_channels=channels, image_dim=image_dim))


def pipeline_of(pipe: TurboPipeline, variant: Variant, components: dict[str, str] | None = None) -> TurboPipeline:
    network = random_network(variant.config, AttentionConfig())
    return TurboPipeline([network], pipe.codec, pipe.text_encoder, variant, components=components)


def test_i2v_gets_a_mask_and_the_latent_of_the_padded_clip(pipe: TurboPipeline) -> None:
    found = condition_on_image(tiny_variant("i2v"), pipe.codec, picture(), LATENT)
    assert found.y_BCTHW is not None
    assert found.y_BCTHW.shape == (1, 4 + LATENT[0], *LATENT[1:])
    mask_BCTHW, latent_BCTHW = found.y_BCTHW[:, :4], found.y_BCTHW[:, 4:]
    assert (mask_BCTHW[:, :, 0] == 1).all()
    assert (mask_BCTHW[:, :, 1:] == 0).all()
    clip_BCTHW = torch.zeros(1, 3, 13, 64, 64)
    clip_BCTHW[0, :, 0] = torch.from_numpy(picture()).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(latent_BCTHW, pipe.codec.encode_pixels(clip_BCTHW))
    assert (found.clip_BLD, found.clean_BCTHW) == (None, None)


def test_ti2v_keeps_the_first_latent_clean(pipe: TurboPipeline) -> None:
    first = pipe.codec.encode(torch.from_numpy(picture())[None, None])
    result = pipeline_of(pipe, tiny_variant("ti2v"))(PROMPT, image=picture(), steps=2)
    assert torch.equal(result.latents[:, :, :1], first)
    # A preview shows it as well, not what the network made of it.
    previews: list[np.ndarray] = []
    arguments = {"steps": 2, "preview": lambda *told: previews.append(told[2])}
    pipeline_of(pipe, tiny_variant("ti2v"))([PROMPT], image=picture(), **arguments)
    assert np.array_equal(previews[0][0], result.frames[0])
    free = pipeline_of(pipe, tiny_variant("ti2v"))(PROMPT, steps=2)
    assert not torch.equal(free.latents[:, :, :1], first)
    # Attention carries the image to the other frames.
    assert not torch.allclose(free.latents[:, :, 1:], result.latents[:, :, 1:], atol=1e-3)


@pytest.mark.parametrize("mode", ["turbo", "teacher"])
def test_i2v_videos_depend_on_the_image(pipe: TurboPipeline, mode: str) -> None:
    i2v = pipeline_of(pipe, tiny_variant("i2v"))
    one, two = (i2v(PROMPT, image=picture(level=level), steps=2, mode=mode).latents for level in (200, 20))
    assert not torch.equal(one, two)
    both = i2v([PROMPT, PROMPT], image=picture(), seeds=[0, 1], steps=2, mode=mode).latents
    assert torch.allclose(both[0], one[0], atol=1e-4, rtol=0)


def test_clip_tokens_reach_the_network(pipe: TurboPipeline, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    assert clip_tokens(str(tmp_path), load_image(picture()), "cpu").shape == (1, 5, 32)
    variant = tiny_variant("i2v", image_dim=32)
    result = pipeline_of(pipe, variant, {"image_encoder": str(tmp_path)})(PROMPT, image=picture(), steps=1)
    assert torch.isfinite(result.latents).all()
    with pytest.raises(ValueError, match="image_encoder is missing"):
        pipeline_of(pipe, variant)(PROMPT, image=picture(), steps=1)


def test_image_and_variant_must_fit(pipe: TurboPipeline) -> None:
    with pytest.raises(ValueError, match="image is missing: variant shapes starts from an image"):
        condition_on_image(tiny_variant("i2v"), pipe.codec, None, LATENT)
    with pytest.raises(ValueError, match="image input needs an i2v variant"):
        condition_on_image(tiny_variant("t2v"), pipe.codec, picture(), LATENT)
    assert condition_on_image(tiny_variant("ti2v"), pipe.codec, None, LATENT) == Conditioning()


def test_a_video_has_the_aspect_of_its_image_unless_it_is_named(pipe: TurboPipeline) -> None:
    i2v = pipeline_of(pipe, tiny_variant("i2v"))
    wide = picture(60, 120)
    sizes = {
        (40, 88): {},  # the area of 64x64 in whole cells
        (64, 64): {"aspect": "1:1"},
        (88, 40): {"aspect": "1:2"},
        (32, 48): {"height": 32, "width": 48},
    }
    for size, said in sizes.items():
        assert i2v(PROMPT, image=wide, steps=1, frames=5, **said).frames.shape == (5, *size, 3)


def test_what_does_not_fit_is_cut_off_evenly(pipe: TurboPipeline) -> None:
    square = picture(64, 64)
    wide = np.concatenate([np.zeros((64, 30, 3), np.uint8), square, np.zeros((64, 30, 3), np.uint8)], axis=1)
    for kind in ("i2v", "ti2v"):
        variant = tiny_variant(kind)
        exact, cropped = (condition_on_image(variant, pipe.codec, image, LATENT) for image in (square, wide))
        for name, tensor in exact.arguments.items():
            assert torch.equal(tensor, cropped.arguments[name]), (kind, name)
