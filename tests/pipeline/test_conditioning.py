"""Image to video: what the network is given besides text, for each family (formats.md 12)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import LATENT, random_network
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from turbotrain.conditioning import (
    GREY,
    Conditioning,
    clip_tokens,
    condition_on_image,
    load_image,
    scale_and_crop,
    size_for_area,
)
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
    clip_THWC = np.full((13, 64, 64, 3), GREY, np.uint8)
    clip_THWC[0] = picture()
    assert torch.equal(latent_BCTHW, pipe.codec.encode(torch.from_numpy(clip_THWC)[None]))
    assert (found.clip_BLD, found.clean_BCTHW) == (None, None)


def test_ti2v_keeps_the_first_latent_clean(pipe: TurboPipeline) -> None:
    first = pipe.codec.encode(torch.from_numpy(picture())[None, None])
    result = pipeline_of(pipe, tiny_variant("ti2v"))(PROMPT, image=picture(), steps=2)
    assert torch.equal(result.latents[:, :, :1], first)
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


def test_images_are_read_from_paths_arrays_and_pil(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), picture(), Image.fromarray(picture())):
        assert np.array_equal(np.asarray(load_image(source)), picture())
    with pytest.raises(ValueError, match="not a readable image file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="expected uint8"):
        load_image(picture().astype(float))


def test_size_follows_the_aspect_and_the_area() -> None:
    wide = Image.new("RGB", (1600, 900))
    height, width = size_for_area(wide, 480 * 832, (16, 16))
    assert height % 16 == width % 16 == 0
    assert abs(width / height - 16 / 9) < 0.1
    assert 0.9 * 480 * 832 < height * width <= 480 * 832
    cropped_HWC = scale_and_crop(wide, 64, 64)
    assert cropped_HWC.shape == (64, 64, 3)


def test_the_crop_is_centred() -> None:
    image_HWC = np.zeros((40, 120, 3), np.uint8)
    image_HWC[:, 40:80] = 255
    assert (scale_and_crop(Image.fromarray(image_HWC), 40, 40) == 255).mean() > 0.97
